"""The content of mask files: their values, and the objects that these are."""

from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ...utils.errors import UserError
from .label import encode_mask, encode_parts
from .tree import Tree, read_text

ONE_CLASS = "object"  # masks have no names
_VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
_OBJECTS = "SegmentationObject"  # the directory of Pascal VOC's masks of objects
_MAX_OBJECTS = 10_000  # in a picture; more values are those of a photograph
_FEW = 100  # numbers in a mask; of more, which are rare, the objects are read in a second pass
_NEAR = 32  # values of a compressed mask that are taken for 0, or for the highest


class Values(NamedTuple):
    """
    The values of a mask.

    Attributes:
        numbers: those other than 0, at most 1,000.
        is_blurred: whether compression or resizing has changed them.
        is_two_valued: whether nearly all are near 0 or near the highest.
        size: width and height.
        parts: the RLE of each connected part of each number, or of all of a mask that is one
            object; None if the mask is to be read again.
    """

    numbers: tuple[int, ...]
    is_blurred: bool
    is_two_valued: bool
    size: tuple[int, int]
    parts: dict[int, list[dict[str, Any]]] | None


class Reading(NamedTuple):
    """
    The meaning of the values in all masks of a dataset.

    Attributes:
        blurred: whether all above half of the highest is an object.
        numbers: whether each value is an object, or else each connected part.
        by_class: whether each value is a class.
        known: the values that are objects; others are void.
        class_names: of colors.
    """

    blurred: bool
    numbers: bool
    by_class: bool
    known: set[int]
    class_names: dict[tuple[int, ...], str]


def _decode(path: str, colors: bool = False) -> np.ndarray:
    """Return the values, (H, W), of the palette if there is one; of colors R + 256 G + 65536 B."""
    mode = "RGB" if colors else None
    try:
        with Image.open(path) as image:
            if mode is None and image.mode in ("RGBA", "LA", "CMYK"):
                mode = "L" if image.mode == "LA" else "RGB"
            values = np.asarray(image.convert(mode) if mode else image)
    except Exception as e:  # Pillow raises errors of all types for damaged files
        raise UserError(f"The mask {path} cannot be read: {e}.") from e
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.ndim == 3 and not colors:
        values = values[:, :, :1] if values.shape[2] == 2 else values  # palette with alpha
        spread = int(np.ptp(values, axis=2).max())
        if spread == 0 or (spread < _NEAR and _is_jpeg(path)):
            return values[:, :, 0]
        return values.astype(np.int64) @ [1, 256, 65536]
    return values if values.dtype == np.uint8 else values.astype(np.int64)


def _is_jpeg(path: str) -> bool:
    return path.lower().endswith((".jpg", ".jpeg", ".jfif"))


def read_values(job: tuple[str, bool]) -> Values:
    """
    Return the values of a mask.

    Args:
        job: the path of a mask, and whether it is one object.

    Raises:
        UserError: if the file is not an image.
    """
    path, is_one = job
    mask = _decode(path)
    size = (mask.shape[1], mask.shape[0])
    parts = ({1: [encode_mask(mask != 0)]} if mask.any() else {}) if is_one else None
    if mask.dtype != np.uint8:
        values = np.unique(mask)
        blurred = _is_jpeg(path) or len(values) > _MAX_OBJECTS
        return Values(tuple(int(n) for n in values[:1001] if n), blurred, not blurred, size, parts)
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel().astype(int)
    highest = int(counts.nonzero()[0][-1])
    between = counts[_NEAR : max(highest - _NEAR, _NEAR)]
    bright = int(counts[max(highest - _NEAR, 1) :].sum())
    is_two_valued = not highest or (highest >= 128 and int(between.sum()) < 0.5 * bright)
    is_jpeg = _is_jpeg(path)
    # Smoothing makes values between the two, or close below the highest.
    is_blurred = is_jpeg or (is_two_valued and int((counts[_NEAR:highest] > 0).sum()) > 3)
    numbers = tuple((counts[1:].nonzero()[0] + 1).tolist())
    is_two_valued = is_two_valued or (highest < 128 and not is_jpeg)
    if not is_one and not is_blurred and len(numbers) <= _FEW:
        parts = {number: encode_parts(mask == number) for number in numbers}
    return Values(numbers, is_blurred, is_two_valued, size, parts)


def find_objects(
    values: Values, job: tuple[str, bool, Reading]
) -> tuple[list[tuple[str, Any]], bool] | None:
    """Return what :func:`read_objects` returns, or None if that must read the mask again."""
    path, is_one, reading = job
    if values.parts is None or reading.blurred:
        return None
    if is_one or not (reading.numbers or reading.by_class):
        return [(ONE_CLASS, rle) for rles in values.parts.values() for rle in rles], False
    if reading.by_class or _OBJECTS in path:
        return None
    known = [rles for number, rles in values.parts.items() if number in reading.known]
    whole = [rles[0] if len(rles) == 1 else mask_util.merge(rles) for rles in known]
    return [(ONE_CLASS, rle) for rle in whole], any(len(rles) > 1 for rles in known)


def read_objects(job: tuple[str, bool, Reading]) -> tuple[list[tuple[str, Any]], bool]:
    """
    Args:
        job: the path of a mask, whether it is one object, and the meaning of the values.

    Returns:
        The class and the RLE of each object, and whether a value has several separate parts.
    """
    path, is_one, reading = job
    mask = _decode(path)
    if reading.blurred:
        mask = (mask > mask.max() / 2).astype(np.uint8)
    if is_one:
        return [(ONE_CLASS, encode_mask(mask != 0))] if mask.any() else [], False
    if not reading.numbers and not reading.by_class:
        return [(ONE_CLASS, rle) for rle in encode_parts(mask != 0)], False
    classes = None
    if reading.by_class or _OBJECTS in path:  # in Pascal VOC's layout, (H, W, 3)
        classes = _decode(path.replace(_OBJECTS, "SegmentationClass"), True)
    objects, apart = [], False
    values = np.unique(mask) if mask.dtype != np.uint8 else np.bincount(mask.ravel()).nonzero()[0]
    for number in sorted(reading.known.intersection(values.tolist())):
        own, name = mask == number, ONE_CLASS
        if classes is not None:
            colors, counts = np.unique(classes[own], axis=0, return_counts=True)
            color = tuple(colors[counts.argmax()].tolist())
            name = reading.class_names.get(color, "class " + "-".join(map(str, color)))
        parts = encode_parts(own)
        apart = apart or len(parts) > 1
        rles = parts if reading.by_class else [encode_mask(own)]
        objects += [(name, rle) for rle in rles if name != "background"]
    return objects, apart


def read_class_names(tree: Tree) -> dict[tuple[int, ...], str]:
    """Return the names of classes by color, of labelmap.txt, or else Pascal VOC's."""
    names: dict[tuple[int, ...], str] = {}
    for file in tree.with_suffix("class_names.txt"):  # labelme's
        lines = read_text(tree.path(file)).splitlines()
        own = [line.strip() for line in lines if line.strip() not in ("", "__ignore__")]
        names = {_voc_color(i): name for i, name in enumerate(own) if i}
    for file in tree.with_suffix("labelmap.txt"):
        for line in read_text(tree.path(file)).splitlines():
            name, *fields = line.split(":")
            if fields and not line.startswith("#"):
                names[tuple(int(v) for v in fields[0].split(",") if v.strip().isdigit())] = name
    return names or {_voc_color(i): name for i, name in enumerate(_VOC_CLASSES, 1)}


def _voc_color(number: int) -> tuple[int, ...]:
    bits = [[number >> (3 * k + c) & 1 for k in range(3)] for c in range(3)]
    return tuple(sum(bit << (7 - k) for k, bit in enumerate(own)) for own in bits)
