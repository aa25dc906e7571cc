"""What numbers, boxes, polygons and RLE have to be, in a registered dataset and in a folder."""

import math
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ..utils.errors import UserError

_NUMBERS = {int, float}

# Shorten values from a file to fit in a message.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
shorten = _repr.repr


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
