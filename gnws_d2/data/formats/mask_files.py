"""The content of mask files: their values, and the objects that these are."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ...utils.errors import UserError
from ..check import is_size
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
_JPEG = (".jpg", ".jpeg", ".jfif")
_NEAR = 32  # values of a compressed mask that are taken for 0, or for the highest

# The RLE of each connected part of each number, or of all of a mask that is one object.
_Parts = dict[int, list[dict[str, Any]]]


class Values(NamedTuple):
    """The values of a mask."""

    numbers: tuple[int, ...]  # those other than 0
    is_blurred: bool  # whether compression or resizing has changed them
    is_two_valued: bool  # whether nearly all are near 0 or near the highest
    size: tuple[int, int]  # width and height
    parts: _Parts | None  # None if the mask is to be read again


class Reading(NamedTuple):
    """The meaning of the values in all masks of a dataset."""

    blurred: bool  # whether all above half of the highest is an object
    numbers: bool  # whether each value is an object, or else each connected part
    by_class: bool  # whether each value is a class
    known: set[int]  # the values that are objects; others are void
    class_names: dict[tuple[int, ...], str]  # of colors


def _decode(path: str, colors: bool = False) -> np.ndarray:
    """Return the values, (H, W), of the palette if there is one; of colors R + 256 G + 65536 B."""
    mode = "RGB" if colors else None
    try:
        with Image.open(path) as image:
            if not is_size(*image.size):
                raise ValueError(f"it is larger than PIL.Image.MAX_IMAGE_PIXELS: {image.size}")
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
        if spread == 0 or (spread < _NEAR and path.lower().endswith(_JPEG)):
            return values[:, :, 0]
        return values.astype(np.int64) @ [1, 256, 65536]
    return values if values.dtype == np.uint8 else values.astype(np.int64)


def _encode(mask: np.ndarray, numbers: Iterable[int], is_one: bool) -> _Parts:
    if is_one:
        return {1: [encode_mask(mask != 0)] if mask.any() else []}
    return {number: encode_parts(mask == number) for number in numbers}


def read_values(path: str, is_one: bool) -> Values:
    """Return the values of a mask, which may be one object. Raise UserError if it is no image."""
    mask, is_jpeg = _decode(path), path.lower().endswith(_JPEG)
    if mask.dtype != np.uint8:
        values = np.unique(mask)
        is_blurred = is_jpeg or len(values) > _MAX_OBJECTS
        numbers = () if is_blurred else tuple(int(n) for n in values if n)
        is_two_valued = not is_blurred
    else:
        counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel().astype(int)
        numbers = tuple((counts[1:].nonzero()[0] + 1).tolist())
        highest = max(numbers, default=0)
        between = counts[_NEAR : max(highest - _NEAR, _NEAR)]
        bright = int(counts[max(highest - _NEAR, 1) :].sum())
        is_two_valued = not highest or (highest >= 128 and int(between.sum()) < 0.5 * bright)
        # Smoothing makes values between the two, or close below the highest.
        is_blurred = is_jpeg or (is_two_valued and int((counts[_NEAR:highest] > 0).sum()) > 3)
        is_two_valued = is_two_valued or (highest < 128 and not is_jpeg)
    parts = None
    if is_one or (not is_blurred and len(numbers) <= _FEW):
        parts = _encode(mask, numbers, is_one)
    return Values(numbers, is_blurred, is_two_valued, mask.shape[::-1], parts)


def read_objects(
    path: str, is_one: bool, values: Values, reading: Reading
) -> tuple[list[tuple[str, Any]], bool]:
    """
    Return the class and the RLE of each object of a mask, and whether a value has several separate
    parts.
    """
    parts = values.parts
    if parts is None or reading.blurred:
        mask = _decode(path)
        if reading.blurred:
            parts = _encode(mask > mask.max() / 2, [1], is_one)
        else:
            numbers = reading.known.intersection(np.unique(mask).tolist())
            parts = _encode(mask, sorted(numbers), is_one)
    if is_one or not (reading.numbers or reading.by_class):
        return [(ONE_CLASS, rle) for rles in parts.values() for rle in rles], False
    classes = None
    if reading.by_class or _OBJECTS in path:  # in Pascal VOC's layout, (H, W, 3)
        of_classes = path.replace(_OBJECTS, "SegmentationClass")
        classes = _decode(of_classes, True)
        if classes.shape[1::-1] != values.size:
            raise UserError(f"The mask {of_classes} has another size than {path}.")
    objects: list[tuple[str, Any]] = []
    known = [rles for number, rles in parts.items() if number in reading.known and rles]
    for rles in known:
        whole, name = rles[0] if len(rles) == 1 else mask_util.merge(rles), ONE_CLASS
        if classes is not None:
            own = classes[mask_util.decode(whole).astype(bool)]
            colors, counts = np.unique(own, axis=0, return_counts=True)
            color = tuple(colors[counts.argmax()].tolist())
            name = reading.class_names.get(color, "class " + "-".join(map(str, color)))
        if name != "background":
            objects += [(name, rle) for rle in (rles if reading.by_class else [whole])]
    return objects, any(len(rles) > 1 for rles in known)


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
    return tuple(sum((number >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3))
