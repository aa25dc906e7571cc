"""labelme, also as X-AnyLabeling writes it: a JSON file for each picture, with its shapes."""

import base64
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from ..check import to_numbers
from .label import IGNORED, Label, Object, box_of, corners_of, ellipse, paste
from .tree import Tree, stem


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    keys = {"shapes", "imagePath"}
    return [f for f, c in tree.jsons.items() if isinstance(c, dict) and keys <= c.keys()]


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the label of a picture. Shapes with the same ``group_id`` are parts of one object."""
    content = tree.jsons[file]
    size = (content.get("imageWidth"), content.get("imageHeight"))
    label = Label(file, str(content["imagePath"] or ""), (stem(file),), size)
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    shapes = content["shapes"] if isinstance(content["shapes"], list) else []
    for number, shape in enumerate(shapes, 1):
        shape = shape if isinstance(shape, dict) else {}
        group = shape.get("group_id")
        what = f"shape {number}" if group is None else f"group {group}"
        groups[str(shape.get("label") or ""), what].append(shape)
    for (name, what), parts in groups.items():
        if name != "_background_":
            object = Object(f"{tree.path(file)}, {what}", name, crowd=name == IGNORED)
            label.add(object, _read_shapes, parts, size)
    yield label


def _read_shapes(object: Object, shapes: list[dict[str, Any]], size: Any) -> None:
    kinds = [shape.get("shape_type") or "polygon" for shape in shapes]
    if kinds == ["rectangle"]:
        object.box, object.rectangle = _read_rectangle(_points(shapes[0])), True
    elif all(kind == "mask" for kind in kinds):
        object.segmentation = mask_util.merge([_paste(shape, size) for shape in shapes])
    else:
        object.segmentation = [_read_polygon(k, _points(s)) for k, s in zip(kinds, shapes)]


def _points(shape: dict[str, Any]) -> list[list[float]]:
    given = shape.get("points")
    points = [to_numbers(point) for point in given] if isinstance(given, list) else []
    if not points or any(point is None or len(point) != 2 for point in points):
        raise ValueError("its points are not pairs of numbers")
    return points  # type: ignore[return-value]


def _paste(shape: dict[str, Any], size: Any) -> dict[str, Any]:
    try:
        png = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
        mask: Any = cv2.imdecode(png, cv2.IMREAD_GRAYSCALE)
    except (KeyError, TypeError, ValueError, cv2.error):
        mask = None
    if mask is None:
        raise ValueError("its mask is not a PNG in base64")
    x, y = _points(shape)[0]
    return paste(mask != 0, x, y, size)


def _read_rectangle(points: list[list[float]]) -> list[float]:
    if len(points) not in (2, 4):
        raise ValueError("a rectangle has two or four points")
    return box_of(*points[0], *points[len(points) // 2])


def _read_polygon(kind: Any, points: list[list[float]]) -> list[float]:
    if kind in ("polygon", "rotation"):
        return [v for point in points for v in point]
    if kind == "rectangle":
        return corners_of(_read_rectangle(points))
    if kind != "circle":
        raise ValueError(f"{kind!r} is not a region")
    if len(points) != 2:
        raise ValueError("a circle has its center and another point")
    (x, y), radius = points[0], math.dist(points[0], points[1])
    return ellipse(x, y, radius, radius)
