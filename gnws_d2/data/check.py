"""
Read a dataset in COCO format, and find its issues: what numbers, boxes, polygons and RLE have to
be, in a registered dataset and in a folder.
"""

import json
import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pycocotools.mask as mask_util
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..utils.errors import UserError
from ..utils.process import no_garbage_collection

_ITEMS = {"categories": "category", "images": "image", "annotations": "annotation"}
_Found = Iterator[tuple[str, str, str]]  # level, key, and the message after the id
_NUMBERS = {int, float}

# Shorten values from a file to fit in a message.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
shorten = _repr.repr


class Issue(NamedTuple):
    """A problem with one item of an annotation file."""

    level: str  # "error", "evaluation" (an error in evaluation only) or "warning"
    item: str  # "category", "image" or "annotation"
    id: Any  # of the item, None if it has none
    key: str  # of the item, such as "bbox"; "file" for the image itself
    message: str  # a sentence, without the name of the file


def parse_json(text: bytes) -> Any:
    """Return the content of a JSON file. Raise ValueError or RecursionError if it is not valid."""
    try:
        return orjson.loads(text)
    except ValueError:  # Python's reader takes NaN, and its errors say more
        return json.loads(text)


def read_coco_json(json_file: str) -> dict[str, Any]:
    """
    Read an annotation file, with lists of dicts in "images", "categories" and "annotations". Raise
    :class:`UserError` if it cannot be read or has another format.
    """
    try:
        with PathManager.open(json_file, "rb") as f, no_garbage_collection():
            content = parse_json(f.read())
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
    Find the issues of what :func:`read_coco_json` returns that show without opening an image.

    Args:
        image_root: directory of the images. Symbolic links in it are followed.
        masks: whether every annotation needs a segmentation.
    """
    known: dict[str, dict[Any, dict[str, Any]]] = {items: {} for items in _ITEMS}  # by id
    for items, item in _ITEMS.items():
        for content in coco[items]:
            for level, key, what in _find_item_issues(items, content, known, image_root, masks):
                message = f"{item} id {shorten(content.get('id'))} {what}"
                yield Issue(level, item, content.get("id"), key, message)


def _find_item_issues(items: str, item: dict, known: dict, image_root: str, masks: bool) -> _Found:
    """Find the issues of an item, and add it to those that are known."""
    if not _is_id(item.get("id")):
        yield "error", "id", "is not a whole number from 0."
    elif item["id"] in known[items]:
        yield "error", "id", "is not unique."
    else:
        known[items][item["id"]] = item
    if items == "images":
        yield from _find_image_issues(item, image_root)
    elif items == "annotations":
        yield from _find_annotation_issues(item, known, masks)
    elif not is_name(name := item.get("name")):
        yield "error", "name", f"has the name {shorten(name)}, which is not printable text."


def _find_image_issues(image: dict[str, Any], image_root: str) -> _Found:
    name: Any = image.get("file_name")
    is_path = isinstance(name, str) and not os.path.isabs(name) and "://" not in name
    if not is_path or ".." in os.path.normpath(name).split(os.sep):
        what = f"has the file name {shorten(name)}, which is not a path in the image directory."
        yield "error", "file_name", what
    elif not PathManager.isfile(path := os.path.join(image_root, name)):
        what = f"has a file that does not exist or is not a regular file: {shorten(path)}."
        yield "error", "file", what
    if _size(image) is None:
        size = f"{shorten(image.get('width'))} x {shorten(image.get('height'))}"
        what = "which is not in pixels, or larger than PIL.Image.MAX_IMAGE_PIXELS."
        yield "error", "size", f"has the size {size}, {what}"


def _find_annotation_issues(annotation: dict[str, Any], known: dict, masks: bool) -> _Found:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if not _is_id(category_id) or category_id not in known["categories"]:
        what = f"has category id {shorten(category_id)}, which is not in 'categories'."
        yield "error", "category_id", what
    if annotation.get("ignore", 0) != 0:
        yield "error", "ignore", "has 'ignore', which Detectron2 does not support: remove it."
    if "iscrowd" not in annotation or not are_numbers([annotation.get("area")]):
        what = "has no 'iscrowd' or no 'area', which COCO's evaluation needs."
        yield "evaluation", "area", what
    if not _is_id(image_id) or image_id not in known["images"]:
        what = f"has image id {shorten(image_id)}, which is not in 'images'."
        yield "error", "image_id", what
    elif size := _size(known["images"][image_id]):  # or else an error of the image
        yield from _find_box_issues(annotation, *size)
        yield from _find_mask_issues(annotation.get("segmentation"), masks, *size)


def _find_box_issues(annotation: dict[str, Any], width: int, height: int) -> _Found:
    bbox: Any = annotation.get("bbox")
    if not are_numbers(bbox) or len(bbox) != 4:
        yield "error", "bbox", f"has the box {shorten(bbox)}, which is not four finite numbers."
        return
    x, y, w, h = bbox
    its_image = f"its image id {annotation['image_id']} of {width}x{height}"
    if fault := find_box_fault(bbox, width, height):
        level = "warning" if w <= 0 or h <= 0 else "error"  # Detectron2 leaves it out
        yield level, "bbox", f"cannot be used in {its_image}: {fault}."
    elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        yield "warning", "bbox", f"has the box {bbox}, which is clipped to {its_image}."


def _find_mask_issues(segmentation: Any, masks: bool, width: int, height: int) -> _Found:
    if segmentation and isinstance(segmentation, list):
        longer = max(width, height)
        for polygon in segmentation:
            level, what = "error", ""
            if not are_numbers(polygon):
                what = "is not a list of finite numbers."
            elif not is_polygon(polygon):
                # Detectron2 leaves it out, but COCO's evaluation takes it for a box.
                level, what = "evaluation" if masks else "warning", "has fewer than three points."
            elif min(polygon) < -longer or max(polygon) > 2 * longer:
                what = f"is far over the edge of its image of {width}x{height}."
            if what:
                yield level, "segmentation", f"has the polygon {shorten(polygon)}, which {what}"
    elif segmentation and isinstance(segmentation, dict):
        if fault := find_rle_fault(segmentation, width, height):
            yield "error", "segmentation", f"has RLE that cannot be decoded: {fault}."
    elif segmentation or masks:
        what = f"has the segmentation {shorten(segmentation)}: give polygons or RLE, or set "
        yield "error", "segmentation", what + "MODEL.MASK_ON False to train boxes only."


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Return the width and height of an image if it can have them."""
    w, h = (image.get(key, 0) for key in ("width", "height"))
    return (w, h) if _is_id(w) and _is_id(h) and is_size(w, h) else None


def _is_id(value: Any) -> bool:
    """Return True for whole numbers from 0, except bools: what COCO's ids and sizes can be."""
    return type(value) in (int, float) and 0 <= value < 2**53 and value % 1 == 0


def are_numbers(values: Any) -> bool:
    """Return True for a list of finite ints or floats, except bools."""
    if not isinstance(values, (list, tuple)) or not _NUMBERS.issuperset(map(type, values)):
        return False
    try:
        return all(map(math.isfinite, values))
    except OverflowError:  # an int that is larger than any float
        return False


def to_number(value: Any) -> float | None:
    """Return a finite number, also one in a string, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_numbers(values: Any) -> list[float] | None:
    """Return a list of finite numbers, or None for anything else."""
    if not isinstance(values, (list, tuple)):
        return None
    if are_numbers(values) and max(map(abs, values), default=0) < 1e15:
        return list(values)
    numbers = [to_number(value) for value in values]
    return None if None in numbers else numbers  # type: ignore[return-value]


def is_size(width: float, height: float) -> bool:
    """Return whether an image can have this size: Pillow refuses larger ones."""
    return min(width, height) > 0 and width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)


def is_name(name: Any) -> bool:
    """Return whether a class can have this name: a terminal obeys control characters."""
    return isinstance(name, str) and name.isprintable()


def is_polygon(polygon: Sequence[float]) -> bool:
    """Return whether numbers are the points of a polygon."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def find_box_fault(box: Sequence[float], width: float, height: float) -> str:
    """Return why the box x, y, w, h cannot be used in an image of a size, or ""."""
    x, y, w, h = box
    if w <= 0 or h <= 0:
        fault = "its box has no area"
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        fault = "its box is outside of the picture"
    elif x < -width or y < -height or x + w > 2 * width or y + h > 2 * height:
        fault = "it reaches far outside of the picture"
    else:
        return ""
    return f"{fault}: [{', '.join(f'{v:g}' for v in box)}]"


def find_rle_fault(rle: dict[str, Any], width: int, height: int) -> str:
    """Return why an RLE cannot be decoded for an image of a size, or ""."""
    if rle.get("size") != [height, width]:
        return f"its size is {shorten(rle.get('size'))}, its image's [{height}, {width}]"
    counts = rle.get("counts")
    # pycocotools would read past the end of a string that stops within a number.
    if not counts or (isinstance(counts, str) and ord(counts[-1]) - 48 & 32):
        return f"its counts {shorten(counts)} are not complete"
    try:
        mask_util.decode(to_rle(rle, height, width))
    except (TypeError, ValueError, OverflowError) as e:
        return f"{shorten(counts)}: {e}"
    return ""


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return the RLE of polygons or of an RLE with a list of counts."""
    rle = segmentation
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.merge(rle) if isinstance(rle, list) else rle


def refuse_corners(boxes: Sequence[Any], sizes: Sequence[Any], where: str) -> None:
    """Refuse boxes that all fit into their images as x1, y1, x2, y2, and many not otherwise."""
    size = np.reshape(sizes, (-1, 2)) + 1
    first, last = np.hsplit(np.reshape(boxes, (-1, 4)), 2)
    fit = (first <= last) & (last <= size)
    if len(size) and fit.all() and (first + last > size).any(axis=1).mean() > 0.2:
        raise UserError(
            f"{where}: the boxes seem to be x1, y1, x2, y2, which would all be inside their "
            "pictures: convert them to x, y, width, height."
        )
