"""labelme, also as X-AnyLabeling writes it: a JSON file for each picture, with its shapes."""

import base64
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from .label import Label, Object, box_of, corners_of, ellipse, encode_mask, to_numbers
from .tree import Tree, stem

_NOT_REGIONS = ("point", "points", "line", "linestrip", "lines")
_BACKGROUND, _IGNORE = "_background_", "__ignore__"


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
        object = Object(f"{tree.path(file)}, {what}", name, crowd=name == _IGNORE)
        try:
            _read_shapes(object, parts, size)
        except (KeyError, ValueError, TypeError, AttributeError, cv2.error) as e:
            object.fault = f"its shape cannot be used: {parts[0].get('shape_type')!r}: {e}"
        if not name:
            object.fault = "it has no label"
        label.objects.append(object)
    yield label


def _read_shapes(object: Object, shapes: list[dict[str, Any]], size: Any) -> None:
    kinds = [shape.get("shape_type") or "polygon" for shape in shapes]
    if kinds == ["rectangle"]:
        (x1, y1), *_, (x2, y2) = _points(shapes[0])[:: 2 if len(shapes[0]["points"]) == 4 else 1]
        object.box, object.rectangle = box_of(x1, y1, x2, y2), True
    elif set(kinds) == {"mask"}:
        full = np.zeros((int(size[1]), int(size[0])), np.uint8)
        for shape in shapes:
            png = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
            mask: Any = cv2.imdecode(png, cv2.IMREAD_GRAYSCALE)
            x, y = (int(v) for v in _points(shape)[0])
            full[y : y + mask.shape[0], x : x + mask.shape[1]] |= mask != 0
        object.segmentation = encode_mask(full)
    else:
        object.segmentation = [_read_polygon(s, kind) for s, kind in zip(shapes, kinds)]


def _points(shape: dict[str, Any]) -> list[list[float]]:
    points = [to_numbers(point) for point in shape["points"]]
    if not points or any(point is None or len(point) != 2 for point in points):
        raise ValueError("its points are not pairs of numbers")
    return points  # type: ignore[return-value]


def _read_polygon(shape: dict[str, Any], kind: str) -> list[float]:
    points = _points(shape)
    if kind in ("polygon", "rotation"):
        return [v for point in points for v in point]
    if kind == "rectangle":
        return corners_of(box_of(*points[0], *points[len(points) // 2]))
    if kind == "circle":
        radius = math.dist(points[0], points[1])
        return ellipse(points[0], radius, radius)
    raise ValueError("it is not a region" if kind in _NOT_REGIONS else "it is not known")
