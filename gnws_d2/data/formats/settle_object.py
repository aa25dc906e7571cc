"""Check and repair one object of a dataset."""

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util

from ..check import find_rle_error
from .label import Object, encode_mask, to_number, to_numbers, to_rle


def turn_object(object: Object, size: tuple[int, int, int]) -> None:
    """Turn an object that was drawn on the stored picture as EXIF turns the picture."""
    width, height, orientation = size

    def turn(x: float, y: float) -> tuple[float, float]:
        x, y = y, x
        x = width - x if orientation in (6, 7) else x
        return x, height - y if orientation in (7, 8) else y

    if (box := to_numbers(object.box)) and len(box) == 4:
        (x1, y1), (x2, y2) = turn(box[0], box[1]), turn(box[0] + box[2], box[1] + box[3])
        object.box = [min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)]
    if isinstance(object.segmentation, list):
        polygons = [to_numbers(polygon) or [] for polygon in object.segmentation]
        pairs = [zip(polygon[::2], polygon[1::2]) for polygon in polygons]
        object.segmentation = [[v for x, y in own for v in turn(x, y)] for own in pairs]
    elif object.segmentation and not find_rle_error(object.segmentation, height, width):
        mask = mask_util.decode(to_rle(object.segmentation, width, height)).T
        mask = mask[:, ::-1] if orientation in (6, 7) else mask
        object.segmentation = encode_mask(mask[::-1] if orientation in (7, 8) else mask)
    object.repairs += ("object of a picture with EXIF orientation, which is turned, too",)


def settle_object(object: Object, width: int, height: int) -> None:
    """Make the coordinates of an object pixels and numbers, or say why it cannot be used."""
    given = object.box
    object.box = to_numbers(given)
    if object.box is not None and len(object.box) != 4:
        object.box = None
    if object.relative:
        scale = np.array([width, height] * 2, float)
        object.box = object.box and (object.box * scale).tolist()
        object.segmentation = object.segmentation and [
            (np.reshape(p, (-1, 2)) * scale[:2]).ravel().tolist() for p in object.segmentation
        ]
    outline, size = _settle_segmentation(object, width, height), (width, height)
    if outline is None:
        unusable = "outline that cannot be used, in place of which the box is"
        object.repairs += (unusable,) * bool(object.segmentation)
        object.segmentation = None
    if outline is not None:
        near = object.box and np.abs(np.subtract(object.box, outline)).max()
        if near is None or near > max(2, 0.1 * max(outline[2:])):
            if given is not None:
                object.repairs += ("box, which is computed from the outline",)
            object.box = outline
    if object.box is None and given is None:
        object.fault = "it has neither an outline nor a box"
    elif object.box is None:
        object.fault = f"its box is not four numbers: {given!r}"
    elif min(object.box[2:]) <= 0:
        object.fault = f"its box has no area: {_short(object.box)}"
    elif (
        object.box[0] >= width
        or object.box[1] >= height
        or object.box[0] + object.box[2] <= 0
        or object.box[1] + object.box[3] <= 0
    ):
        object.fault = f"its box is outside of the picture: {_short(object.box)}"
    elif any(a < -s or a + b > 2 * s for a, b, s in zip(object.box, object.box[2:], size)):
        object.fault = f"it reaches far outside of the picture: {_short(object.box)}"
    elif isinstance(given, (list, tuple)) and any(isinstance(v, str) for v in given):
        object.repairs += ("number that was a string",)
    area = to_number(object.area)
    if not area or area <= 0:
        object.area = None
        if object.segmentation and not object.fault:
            object.area = float(mask_util.area(to_rle(object.segmentation, height, width)))


def _settle_segmentation(object: Object, width: int, height: int) -> list[float] | None:
    """Keep polygons and RLE that can be used, and return their box."""
    given = object.segmentation
    if isinstance(given, dict):
        if find_rle_error(given, width, height):
            return None
        rle = to_rle(given, height, width)
        if not mask_util.area(rle):
            return None
        if isinstance(rle["counts"], bytes):
            rle["counts"] = rle["counts"].decode()
        object.segmentation, object.area = rle, float(mask_util.area(rle))
        return mask_util.toBbox(rle).tolist()
    if not isinstance(given, list):
        return None
    if given and not isinstance(given[0], (list, tuple)):
        given = [given]
        object.repairs += ("polygon without the list around it",)
    polygons = [to_numbers(polygon) for polygon in given]
    usable = [p for p in polygons if p and len(p) >= 6 and len(p) % 2 == 0]
    if not usable:
        return None
    if len(usable) < len(polygons):
        object.repairs += ("outline with a part that cannot be used",)
    x = [v for polygon in usable for v in polygon[::2]]
    y = [v for polygon in usable for v in polygon[1::2]]
    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    if min(box[2:]) > 0:
        object.segmentation = usable
        return box
    return None


def _short(box: Sequence[float]) -> str:
    return f"[{', '.join(f'{v:g}' for v in box)}]"
