"""CVAT for images 1.1: one XML file for many pictures."""

import math
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ...utils.errors import UserError
from ..check import to_number, to_numbers
from .label import Label, Object, box_of, check_name, ellipse, paste
from .tree import Tree

_REGIONS = ("box", "polygon", "mask", "ellipse")
_OTHERS = ("polyline", "points", "cuboid", "skeleton")


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    return [f for f in tree.with_suffix(".xml") if b"<annotations" in tree.head(f)]


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the labels of a file."""
    root = tree.xml(file)
    if root.find("track") is not None:
        raise UserError(f"{tree.path(file)} is CVAT for video: export it as CVAT for images 1.1.")
    for index, image in enumerate(root.iter("image"), 1):
        name = check_name(image.get("name"), f"{tree.path(file)}: picture {index}")
        size = (image.get("width"), image.get("height"))
        # Of a project: each subset has a directory.
        named = "/".join(filter(None, (image.get("subset"), name)))
        label = Label(file, named, (), size)
        for number, item in enumerate((i for i in image if i.tag in _REGIONS + _OTHERS), 1):
            where = f"{tree.path(file)}, {name}, {item.tag} {number}"
            label.add(Object(where, item.get("label", "")), _read_shape, item, size)
        yield label


def _read_shape(object: Object, item: ElementTree.Element, size: tuple) -> None:
    if item.tag in _OTHERS:
        raise ValueError(f"a {item.tag} is not a region")
    angle = math.radians(to_number(item.get("rotation")) or 0)
    if item.tag == "polygon":
        points = to_numbers(item.get("points", "").replace(";", ",").split(","))
        object.segmentation = [points] if points else None
    elif item.tag == "mask":
        object.segmentation = _read_mask(item, size)
    elif item.tag == "ellipse":
        if values := to_numbers([item.get(key) for key in ("cx", "cy", "rx", "ry")]):
            object.segmentation = [ellipse(*values, angle=angle)]
    elif values := to_numbers([item.get(key) for key in ("xtl", "ytl", "xbr", "ybr")]):
        if angle:
            object.segmentation = [_turn(box_of(*values), angle)]
        else:
            object.box, object.rectangle = box_of(*values), True
    if object.box is None and object.segmentation is None:
        raise ValueError("it has values that are not numbers")


def _turn(box: list[float], angle: float) -> list[float]:
    x, y, w, h = box
    cos, sin = math.cos(angle), math.sin(angle)
    corners = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2 @ [[cos, sin], [-sin, cos]]
    return (corners + (x + w / 2, y + h / 2)).ravel().tolist()


def _read_mask(item: ElementTree.Element, size: tuple) -> dict[str, Any]:
    """Decode an RLE by rows of a box: the lengths of runs of 0 and 1 in turns."""
    box = to_numbers([item.get(key) for key in ("left", "top", "width", "height")])
    runs = to_numbers(item.get("rle", "").split(","))
    if not box or not runs or min(*runs, *box[2:]) < 0 or not sum(runs) == box[2] * box[3] < 2**31:
        raise ValueError("its RLE does not fill its box")
    flat = np.repeat(np.arange(len(runs)) % 2, np.array(runs, int))
    return paste(flat.reshape(int(box[3]), int(box[2])), box[0], box[1], size)
