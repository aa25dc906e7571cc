"""Check and repair one object of a dataset."""

import numpy as np
import pycocotools.mask as mask_util

from ..rules import find_box_fault, find_rle_fault, is_polygon, to_number, to_numbers, to_rle
from .label import Object, box_of, encode_mask


def turn_object(object: Object, size: tuple[int, int, int]) -> None:
    """Turn an object that was drawn on the stored picture as EXIF turns the picture."""
    width, height, orientation = size
    flip_x, flip_y = orientation in (6, 7), orientation in (7, 8)

    def turn(points: list[float]) -> list[float]:
        y, x = np.reshape(points[: len(points) // 2 * 2], (-1, 2)).T
        return (
            np.stack([width - x if flip_x else x, height - y if flip_y else y], 1).ravel().tolist()
        )

    if (box := to_numbers(object.box)) and len(box) == 4:
        x, y, w, h = box
        object.box = box_of(*turn([x, y, x + w, y + h]))
    if isinstance(object.segmentation, list):
        object.segmentation = [turn(to_numbers(p) or []) for p in object.segmentation]
    elif object.segmentation and not find_rle_fault(object.segmentation, height, width):
        mask = mask_util.decode(to_rle(object.segmentation, width, height)).T
        object.segmentation = encode_mask(mask[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
    object.repairs += ("object of a picture with EXIF orientation, which is turned, too",)


def settle_object(object: Object, width: int, height: int) -> None:
    """Make the coordinates of an object pixels and numbers, or say why it cannot be used."""
    given = object.box
    box = to_numbers(given)
    object.box = box if box and len(box) == 4 else None
    if object.relative:
        scale = np.array([width, height] * 2, float)
        object.box = object.box and (object.box * scale).tolist()
        object.segmentation = object.segmentation and [
            (np.reshape(p, (-1, 2)) * scale[:2]).ravel().tolist() for p in object.segmentation
        ]
    outline = _settle_segmentation(object, width, height)
    if outline is None:
        unusable = "outline that cannot be used, in place of which the box is"
        object.repairs += (unusable,) * bool(object.segmentation)
        object.segmentation = None
    elif not object.box or np.abs(np.subtract(object.box, outline)).max() > max(
        2, 0.1 * max(outline[2:])
    ):
        object.repairs += ("box, which is computed from the outline",) * (given is not None)
        object.box = outline
    if object.box is not None:
        object.fault = find_box_fault(object.box, width, height)
    elif given is None:
        object.fault = "it has neither an outline nor a box"
    else:
        object.fault = f"its box is not four numbers: {given!r}"
    if not object.fault and isinstance(given, (list, tuple)) and str in map(type, given):
        object.repairs += ("number that was a string",)
    if (to_number(object.area) or 0) <= 0:
        object.area = None
        if object.segmentation and not object.fault:
            object.area = float(mask_util.area(to_rle(object.segmentation, height, width)))


def _settle_segmentation(object: Object, width: int, height: int) -> list[float] | None:
    """Keep polygons and RLE that can be used, and return their box."""
    given = object.segmentation
    has_size = object.encoded and given["size"] == [height, width]
    if isinstance(given, dict) and (has_size or not find_rle_fault(given, width, height)):
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
    usable = [p for polygon in given if (p := to_numbers(polygon)) and is_polygon(p)]
    if not usable:
        return None
    if len(usable) < len(given):
        object.repairs += ("outline with a part that cannot be used",)
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in usable])
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    if x2 <= x1 or y2 <= y1:
        return None
    object.segmentation = usable
    return [x1, y1, x2 - x1, y2 - y1]
