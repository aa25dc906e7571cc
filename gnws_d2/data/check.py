"""Read a dataset in COCO format, and find its issues."""

import json
import math
import os
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson
import pycocotools.mask as mask_util
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..utils.errors import UserError
from ..utils.process import no_garbage_collection

_ITEMS = {"categories": "category", "images": "image", "annotations": "annotation"}

_Found = tuple[str, str, str]  # level, key, and the message after the id

# Shorten values from a file to fit in a message.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_short = _repr.repr


class Issue(NamedTuple):
    """A problem with one item of an annotation file."""

    level: str  # "error", "evaluation" (an error in evaluation only) or "warning"
    item: str  # "category", "image" or "annotation"
    id: Any  # of the item, None if it has none
    key: str  # of the item, such as "bbox"; "file" for the image itself
    message: str  # a sentence, without the name of the file


def read_coco_json(json_file: str) -> dict[str, Any]:
    """
    Read an annotation file, with lists of dicts in "images", "categories" and "annotations".

    Raises:
        UserError: if it cannot be read or has another format.
    """
    try:
        with PathManager.open(json_file, "rb") as f:
            text = f.read()
        with no_garbage_collection():
            try:
                content = orjson.loads(text)
            except ValueError:  # Python's reader takes NaN, and its errors say more
                content = json.loads(text)
    except OSError as e:
        raise UserError(f"Cannot read the annotation file {json_file}: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"The annotation file {json_file} is not valid JSON: {e}.") from e
    # Sets for testing have no annotations.
    coco = {"annotations": [], **content} if isinstance(content, dict) else {}
    for key in _ITEMS:
        items = coco.get(key)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{json_file} is not in COCO's instances format: no list {key!r}.")
        if not items and key != "annotations":
            raise UserError(f"{json_file} has nothing in {key!r}.")
    return coco


def find_issues(coco: dict[str, Any], image_root: str, *, masks: bool) -> Iterator[Issue]:
    """
    Find the issues that show without opening an image.

    Args:
        coco: what :func:`read_coco_json` returns.
        image_root: directory of the images. Symbolic links in it are followed.
        masks: whether every annotation needs a segmentation.
    """
    for items, item in _ITEMS.items():
        seen = set()
        for content in coco[items]:
            if not _is_id(content.get("id")):
                yield _issue(item, content, "error", "id", "is not a whole number from 0.")
            elif content["id"] in seen:
                yield _issue(item, content, "error", "id", "is not unique.")
            else:
                seen.add(content["id"])
    for category in coco["categories"]:
        name = category.get("name")
        # Detectron2 prints the names, and a terminal obeys control characters.
        if not isinstance(name, str) or not name.isprintable():
            what = f"has the name {_short(name)}, which is not printable text."
            yield _issue("category", category, "error", "name", what)
    for image in coco["images"]:
        for found in _find_image_issues(image, image_root):
            yield _issue("image", image, *found)
    sizes = {image["id"]: _size(image) for image in coco["images"] if _is_id(image.get("id"))}
    class_ids = {c["id"] for c in coco["categories"] if _is_id(c.get("id"))}
    for annotation in coco["annotations"]:
        for found in _find_annotation_issues(annotation, sizes, class_ids, masks):
            yield _issue("annotation", annotation, *found)


def _issue(item: str, content: dict[str, Any], level: str, key: str, what: str) -> Issue:
    message = f"{item} id {_short(content.get('id'))} {what}"
    return Issue(level, item, content.get("id"), key, message)


def _find_image_issues(image: dict[str, Any], image_root: str) -> Iterator[_Found]:
    name: Any = image.get("file_name")
    if (
        not isinstance(name, str)
        or os.path.isabs(name)
        or "://" in name
        or ".." in os.path.normpath(name).split(os.sep)
    ):
        what = f"has the file name {_short(name)}, which is not a path in the image directory."
        yield "error", "file_name", what
    elif not PathManager.isfile(path := os.path.join(image_root, name)):
        what = f"has a file that does not exist or is not a regular file: {_short(path)}."
        yield "error", "file", what
    if _size(image) is None:
        what = f"has the size {_short(image.get('width'))} x {_short(image.get('height'))}, which "
        what += "is not in pixels, or larger than PIL.Image.MAX_IMAGE_PIXELS."
        yield "error", "size", what


def _find_annotation_issues(
    annotation: dict[str, Any], sizes: dict[Any, Any], class_ids: set[Any], masks: bool
) -> Iterator[_Found]:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if not _is_id(category_id) or category_id not in class_ids:
        what = f"has category id {_short(category_id)}, which is not in 'categories'."
        yield "error", "category_id", what
    if annotation.get("ignore", 0) != 0:
        yield "error", "ignore", "has 'ignore', which Detectron2 does not support: remove it."
    if "iscrowd" not in annotation or not _are_numbers([annotation.get("area")]):
        what = "has no 'iscrowd' or no 'area', which COCO's evaluation needs."
        yield "evaluation", "area", what
    if not _is_id(image_id) or image_id not in sizes:
        what = f"has image id {_short(image_id)}, which is not in 'images'."
        yield "error", "image_id", what
    elif sizes[image_id] is not None:  # or else an error of the image
        yield from _find_box_issues(annotation, *sizes[image_id])
        yield from _find_mask_issues(annotation, masks, *sizes[image_id])


def _find_box_issues(annotation: dict[str, Any], width: int, height: int) -> Iterator[_Found]:
    bbox: Any = annotation.get("bbox")
    if not _are_numbers(bbox) or len(bbox) != 4:
        yield "error", "bbox", f"has the box {_short(bbox)}, which is not four finite numbers."
        return
    x, y, w, h = bbox
    x2, y2 = x + w, y + h
    if w <= 0 or h <= 0:
        level, how = "warning", "has no area and is not trained on, in"
    elif not (-width <= x < width and 0 < x2 <= 2 * width) or not (
        -height <= y < height and 0 < y2 <= 2 * height
    ):
        level, how = "error", "is outside or far over the edge of"
    elif x < -1 or y < -1 or x2 > width + 1 or y2 > height + 1:
        level, how = "warning", "is clipped to"
    else:
        return
    what = f"has the box {bbox} (x, y, width, height), which {how} its image id "
    yield level, "bbox", what + f"{_short(annotation['image_id'])} of {width}x{height}."


def _find_mask_issues(
    annotation: dict[str, Any], masks: bool, width: int, height: int
) -> Iterator[_Found]:
    segmentation: Any = annotation.get("segmentation")
    if segmentation and isinstance(segmentation, list):
        for polygon in segmentation:
            level, what = _find_polygon_issue(polygon, masks, width, height)
            if what:
                yield level, "segmentation", f"has the polygon {_short(polygon)}, which {what}"
    elif segmentation and isinstance(segmentation, dict):
        if error := find_rle_error(segmentation, width, height):
            yield "error", "segmentation", f"has RLE that cannot be decoded: {error}."
    elif segmentation or masks:
        what = f"has the segmentation {_short(segmentation)}: give polygons or RLE, or set "
        yield "error", "segmentation", what + "MODEL.MASK_ON False to train boxes only."


def _find_polygon_issue(polygon: Any, masks: bool, width: int, height: int) -> tuple[str, str]:
    """Return the level and the end of a sentence, which is empty for a polygon without issue."""
    longer = max(width, height)
    if not _are_numbers(polygon):
        return "error", "is not a list of finite numbers."
    if len(polygon) < 6 or len(polygon) % 2:
        # Detectron2 leaves it out, but COCO's evaluation takes it for a box.
        return "evaluation" if masks else "warning", "has fewer than three points."
    if min(polygon) < -longer or max(polygon) > 2 * longer:
        return "error", f"is far over the edge of its image of {width}x{height}."
    return "", ""


def find_rle_error(rle: dict[str, Any], width: int, height: int) -> str:
    """Return why an RLE cannot be decoded for an image of a size, or ""."""
    if rle.get("size") != [height, width]:
        return f"its size is {_short(rle.get('size'))}, its image's [{height}, {width}]"
    counts = rle.get("counts")
    # pycocotools would read past the end of a string that stops within a number.
    if not counts or (isinstance(counts, str) and ord(counts[-1]) - 48 & 32):
        return f"its counts {_short(counts)} are not complete"
    try:
        if isinstance(counts, list):
            rle = mask_util.frPyObjects(rle, height, width)
        mask_util.decode(rle)
    except (TypeError, ValueError, OverflowError) as e:
        return f"{_short(counts)}: {e}"
    return ""


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Return the width and height of an image if it can have them."""
    w: Any = image.get("width")
    h: Any = image.get("height")
    if not _is_id(w) or not _is_id(h) or not 0 < w * h <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    return w, h


def _is_id(value: Any) -> bool:
    """Return True for whole numbers from 0, except bools: what COCO's ids and sizes can be."""
    return type(value) in (int, float) and 0 <= value < 2**53 and value % 1 == 0


def _are_numbers(values: Any) -> bool:
    """Return True for a list of finite ints or floats, except bools."""
    if not isinstance(values, list) or not {int, float}.issuperset(map(type, values)):
        return False
    try:
        return all(map(math.isfinite, values))
    except OverflowError:  # an int that is larger than any float
        return False
