"""COCO: one JSON file for many pictures. Roboflow, CVAT, FiftyOne, VIA and others export it."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ...utils.errors import UserError
from ..check import is_name, read_coco_json, to_number
from .label import Label, Object
from .tree import Tree


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    found = {}  # with whether there are keypoints
    for file, content in tree.jsons.items():
        if isinstance(content, dict) and "images" in content and _has_objects(content):
            own = content["categories"] if isinstance(content.get("categories"), list) else []
            found[file] = any(isinstance(c, dict) and "keypoints" in c for c in own)
    # COCO's own annotations have the same people with and without keypoints.
    return [file for file in found if not found[file]] or [*found]


def _has_objects(content: dict[str, Any]) -> bool:
    """Whether there are objects, and not captions or panoptic segments."""
    annotations = content.get("annotations")
    if not annotations or not isinstance(annotations, list):
        return annotations == [] and bool(content.get("categories"))
    keys = annotations[0].keys() if isinstance(annotations[0], dict) else set()
    return not keys & {"caption", "segments_info"}


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the labels of a file, with the classes of the dataset in ``tree.classes``."""
    coco = read_coco_json(tree.path(file))
    names = _read_classes(tree, file, coco)
    objects: dict[Any, list[Object]] = defaultdict(list)
    for annotation in coco.pop("annotations"):
        where = f"{tree.path(file)}, annotation id {annotation.get('id')!r}"
        category = _id(annotation.get("category_id"))
        object = Object(
            where, names.get(category, ""), annotation.get("bbox"), annotation.get("segmentation"),
            annotation.get("area"), annotation.get("iscrowd") in (1, "1"),
        )  # fmt: skip
        if isinstance(annotation.get("image_id"), str):
            object.repairs += ("image_id that was a string",)
        if category not in names:
            object.fault = f"its category_id is not a category: {annotation.get('category_id')!r}"
        objects[_id(annotation.get("image_id"))].append(object)
    seen = set()
    for image in coco["images"]:
        number, name = _id(image.get("id")), image.get("file_name")
        what = f"{tree.path(file)}: the image with id {image.get('id')!r}"
        if number is None or number in seen or not isinstance(name, str) or not name:
            raise UserError(f"{what} has no id, the id of another one, or no file_name.")
        seen.add(number)
        size = (image.get("width"), image.get("height"))
        yield Label(file, name, (), size, objects.pop(number, []))
    for left in objects.values():
        for object in left:
            object.fault = object.fault or "its image_id is not that of an image"
        yield Label(file, objects=left)


def _id(value: Any) -> Any:
    """Return an id, as a number where it is one in a string."""
    number = to_number(value)
    return value if number is None and isinstance(value, str) else number


def _read_classes(tree: Tree, file: str, coco: dict[str, Any]) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for category in coco["categories"]:
        number, name = _id(category.get("id")), category.get("name")
        if number is None or number in names or not name or not is_name(str(name)):
            what = f"{tree.path(file)}: the category {category!r} has"
            raise UserError(f"{what} no id, the id of another one, or no name.")
        names[number] = str(name)
        if isinstance(number, float) and number not in tree.classes.values():
            tree.classes.setdefault(names[number], int(number))
    return names
