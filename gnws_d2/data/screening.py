"""
Screen a COCO file for what needs a closer look, over arrays: most files have nothing, and the
checks of :mod:`.check`, one object at a time, would take longer than loading the file.
"""

import itertools
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

Item = dict[str, Any]

_CHUNK = 50_000  # annotations whose numbers are in arrays at a time


def screen_images(images: list[Item], image_root: str) -> list[Item]:
    """Return the images without a plain file name of a regular file in the image directory."""
    files: dict[str, set[str]] = {}

    def is_file(name: Any) -> bool:
        if not isinstance(name, str) or ".." in name or os.path.isabs(name):
            return False
        directory, base = os.path.split(name)
        if directory not in files:
            files[directory] = _list_files(os.path.join(image_root, directory))
        return base in files[directory]

    return [image for image in images if not is_file(image.get("file_name"))]


def _list_files(directory: str) -> set[str]:
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # also URLs, and names with null characters
        return set()


def screen_annotations(
    annotations: list[Item], sizes: dict[Any, Any], class_ids: set[Any], masks: bool
) -> list[Item]:
    """
    Return the annotations that may have an issue: all that do, and few others.

    Args:
        sizes: (width, height) by image id, None for those with an issue.
        class_ids: the ids of the categories.
        masks: whether every annotation needs a segmentation.
    """
    suspects = []
    for first in range(0, len(annotations), _CHUNK):
        part = annotations[first : first + _CHUNK]
        suspects += _screen_part(part, sizes, class_ids, masks)
    return suspects


def _screen_part(
    annotations: list[Item], sizes: dict[Any, Any], class_ids: set[Any], masks: bool
) -> list[Item]:
    plain = [
        annotation.get("category_id") in class_ids
        and annotation.get("ignore", 0) == 0
        and "iscrowd" in annotation
        and type(annotation.get("area")) in (int, float)
        and sizes.get(annotation.get("image_id")) is not None
        and _is_list(annotation.get("bbox"), 4)
        and (
            _is_list(annotation["segmentation"]) and all(map(_is_list, annotation["segmentation"]))
            if annotation.get("segmentation")
            else not masks
        )
        for annotation in annotations
    ]
    plain_ones = list(itertools.compress(annotations, plain))
    good = np.zeros(len(annotations), bool)
    good[plain] = _have_good_shapes(plain_ones, [sizes[a["image_id"]] for a in plain_ones])
    return list(itertools.compress(annotations, ~good))


def _is_list(value: Any, length: int | None = None) -> bool:
    return type(value) is list and length in (None, len(value))


def _have_good_shapes(annotations: list[Item], sizes: list[tuple[int, int]]) -> np.ndarray:
    """Return for each annotation whether its box, area and polygons are numbers in the image."""
    polygons = [a.get("segmentation") or [] for a in annotations]
    of_annotation = np.repeat(np.arange(len(annotations)), [len(p) for p in polygons])
    polygons = list(itertools.chain.from_iterable(polygons))
    lengths = np.array([len(polygon) for polygon in polygons], int)
    areas = _numbers([a["area"] for a in annotations])
    boxes = _numbers(itertools.chain.from_iterable(a["bbox"] for a in annotations))
    coordinates = _numbers(itertools.chain.from_iterable(polygons))
    if areas is None or boxes is None or coordinates is None:
        return np.zeros(len(annotations), bool)  # one of them is not: look at all

    extent = np.array(sizes, float).reshape(-1, 2)
    corner, size = np.hsplit(boxes.reshape(-1, 4), 2)
    other = corner + size
    inside = (size > 0) & (corner >= -1) & (other <= extent + 1) & (other > 0) & (corner < extent)
    good = inside.all(axis=1) & np.isfinite(areas)
    shape_is_good = (lengths >= 6) & (lengths % 2 == 0)
    if lengths.all() and len(lengths):  # else reduceat would take the number after an empty one
        starts = np.cumsum(lengths) - lengths
        longer = extent.max(axis=1)[of_annotation]
        shape_is_good &= np.minimum.reduceat(coordinates, starts) >= -longer
        shape_is_good &= np.maximum.reduceat(coordinates, starts) <= 2 * longer
    elif len(lengths):
        return np.zeros(len(annotations), bool)
    good[of_annotation[~shape_is_good]] = False
    return good


def _numbers(values: Iterable[Any]) -> np.ndarray | None:
    """Return an array, or None if one of the values is not an int or a float (or a bool)."""
    values = list(values)
    if not {int, float}.issuperset(map(type, values)):
        return None
    try:
        return np.array(values, float)
    except OverflowError:  # an int that is longer
        return None
