"""YOLO: a text file for each picture, with a class number and a box or polygon in each line."""

import math
import os
import re
from collections.abc import Iterator

from ...utils.errors import UserError
from ..check import is_polygon, to_number, to_numbers
from .label import Label, Object
from .tree import Tree, read_text, stem
from .yolo_data import NAME_FILES, find_data_file, read_classes

_SEPARATOR = re.compile(r"[\s,;]+")


def find(tree: Tree) -> list[str]:
    """Return the label files of this format: those that begin with a class and coordinates."""
    found = []
    stems = {stem(picture).lower() for picture in tree.pictures}
    for file in tree.with_suffix(".txt"):
        *directories, name = file.lower().split("/")
        if name not in NAME_FILES and ("labels" in directories or stem(name) in stems):
            line = read_text(tree.path(file)).strip().partition("\n")[0].strip()
            first = [to_number(word) is not None for word in _SEPARATOR.split(line)[:5]]
            if not line or sum(first) >= 4:
                found.append(file)
    return found if any(os.path.getsize(tree.path(f)) for f in found) else []


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the label of a picture, with the classes of the dataset in ``tree.classes``."""
    tree.classes = tree.classes or read_classes(tree)
    names = {number - 1: name for name, number in tree.classes.items()}
    data_file, content = find_data_file(tree)
    shape = to_numbers(content.get("kpt_shape") or [0])
    if shape is None:
        raise UserError(f"{tree.path(data_file)}: kpt_shape is not a list of two numbers.")
    keypoints = math.prod(shape)
    objects = [
        _parse_line(line.strip(), names, keypoints, f"{tree.path(file)}, line {number}")
        for number, line in enumerate(read_text(tree.path(file)).splitlines(), 1)
        if line.strip()
    ]
    yield Label(file, stems=(stem(file),), objects=objects)


def _parse_line(line: str, names: dict[int, str], keypoints: float, where: str) -> Object:
    words = _SEPARATOR.split(line)
    numbers = [to_number(word) for word in words]
    object = Object(where, "", relative=True)
    if numbers[0] is None or None in numbers or numbers[0] not in names:
        what = "has a value that is not a number" if None in numbers else "is not of a known class"
        object.fault = f"it {what}: {' '.join(words)[:80]!r}"
        return object
    object.name, values = names[int(numbers[0])], [v or 0.0 for v in numbers[1:]]
    if len(values) in (5, 4 + keypoints, 5 + keypoints):
        values = values[:4]  # with keypoints, or with a confidence behind the box
    if len(values) == 4:
        x, y, w, h = values
        object.box = [x - w / 2, y - h / 2, w, h]
        outside = not (0 < w <= 1.01 and 0 < h <= 1.01 and 0 <= x <= 1 and 0 <= y <= 1)
    else:
        object.segmentation = [values]
        outside = not all(-0.01 <= v <= 1.01 for v in values)
    if outside:
        object.fault = f"its coordinates are not from 0 to 1: {' '.join(words)[:80]!r}"
    elif len(values) != 4 and not is_polygon(values):
        count = len(values)
        object.fault = f"its coordinates are neither a box (4) nor a polygon: there are {count}"
    return object
