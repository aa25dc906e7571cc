"""labelme, also as X-AnyLabeling writes it: a JSON file for each picture, with its shapes."""

import base64
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from .label import IGNORED, Label, Object, box_of, corners_of, ellipse, paste, to_numbers
from .tree import Tree, stem

_NOT_REGIONS = ("point", "points", "line", "linestrip", "lines")
_BACKGROUND = "_background_"


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
        key = (shape.get("label"), f"shape {number}" if group is None else f"group {group}")
        groups[str(key[0] or ""), key[1]].append(shape)
    for (name, what), parts in groups.items():
        if name == _BACKGROUND:
            continue
        object = Object(f"{tree.path(file)}, {what}", name, crowd=name == IGNORED)
        try:
            _read_shapes(object, parts, size)
        except ValueError as e:
            object.fault = f"its shape cannot be used: {parts[0].get('shape_type')!r}: {e}"
        if not name:
            object.fault = "it has no label"
        label.objects.append(object)
    yield label


def _read_shapes(object: Object, shapes: list[dict[str, Any]], size: Any) -> None:
    kinds = [shape.get("shape_type") or "polygon" for shape in shapes]
    if kinds == ["rectangle"]:
        object.box, object.rectangle = _read_rectangle(shapes[0]), True
    elif set(kinds) == {"mask"}:
        parts = [_paste(shape, size) for shape in shapes]
        object.segmentation = mask_util.merge(parts)
    else:
        object.segmentation = [_read_polygon(s, kind) for s, kind in zip(shapes, kinds)]


def _paste(shape: dict[str, Any], size: Any) -> dict[str, Any]:
    x, y = _points(shape)[0]
    try:
        png = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
        mask = cv2.imdecode(png, cv2.IMREAD_GRAYSCALE)
    except (KeyError, TypeError, ValueError, cv2.error):
        mask = None
    if mask is None:
        raise ValueError("its mask is not a PNG in base64")
    return paste(mask != 0, x, y, size)


def _read_rectangle(shape: dict[str, Any]) -> list[float]:
    points = _points(shape)
    if len(points) not in (2, 4):
        raise ValueError("a rectangle has two or four points")
    return box_of(*points[0], *points[len(points) // 2])


def _points(shape: dict[str, Any]) -> list[list[float]]:
    points = shape.get("points")
    points = [to_numbers(point) for point in points] if isinstance(points, list) else []
    if not points or any(point is None or len(point) != 2 for point in points):
        raise ValueError("its points are not pairs of numbers")
    return points  # type: ignore[return-value]


def _read_polygon(shape: dict[str, Any], kind: str) -> list[float]:
    points = _points(shape)
    if kind in ("polygon", "rotation"):
        return [v for point in points for v in point]
    if kind == "rectangle":
        return corners_of(_read_rectangle(shape))
    if kind == "circle":
        if len(points) != 2:
            raise ValueError("a circle has its center and another point")
        radius = math.dist(points[0], points[1])
        return ellipse(points[0], radius, radius)
    raise ValueError("it is not a region" if kind in _NOT_REGIONS else "it is not known")
