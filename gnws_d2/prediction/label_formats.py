"""
The labels of a picture as text of each format. Objects are COCO's, with the ``name`` and
``number`` of their class.
"""

import json
import os
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..data.formats.label import corners_of
from .outlines import outline_mask

_Item = dict[str, Any]


def outline(annotation: _Item, one: bool = False) -> list[np.ndarray]:
    """
    Return the polygons of an object, (N, 2), none if it has no mask. Of an empty mask it is the
    box. With `one`, all parts are joined.
    """
    if "segmentation" not in annotation:
        return []
    found = outline_mask(annotation["segmentation"], one)
    return found or [np.reshape(corners_of(annotation["bbox"]), (-1, 2))]


def to_coco(annotation: _Item) -> _Item:
    """Return an annotation, without a score, and with polygons."""
    own = {k: v for k, v in annotation.items() if k not in ("score", "name", "number")}
    polygons = [polygon.ravel().tolist() for polygon in outline(annotation)]
    if not polygons:
        return own
    points = np.reshape(np.concatenate(polygons), (-1, 2))
    box = [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
    return {**own, "segmentation": polygons, "bbox": box}


def to_labelme(image: _Item, objects: list[_Item]) -> str:
    """Return labelme's JSON, where an object of several parts has a ``group_id``."""
    shapes = []
    for o in objects:
        x, y, w, h = o["bbox"]
        outlines = [("polygon", polygon.tolist()) for polygon in outline(o)]
        outlines = outlines or [("rectangle", [[x, y], [x + w, y + h]])]
        group = o["id"] if len(outlines) > 1 else None
        shapes += [
            {"label": o["name"], "points": p, "group_id": group, "shape_type": kind, "flags": {}}
            for kind, p in outlines
        ]
    label = {
        "version": "5.0.0", "flags": {}, "shapes": shapes, "imageData": None,
        "imagePath": os.path.basename(image["file_name"]),
        "imageHeight": image["height"], "imageWidth": image["width"],
    }  # fmt: skip
    return json.dumps(label, indent=1)


def to_yolo(image: _Item, objects: list[_Item]) -> str:
    """Return a line for each object: a polygon, or a box's center and size."""
    lines = ""
    for o in objects:
        x, y, w, h = o["bbox"]
        points = [*outline(o, one=True), np.array([[x + w / 2, y + h / 2], [w, h]])][0]
        values = (points / (image["width"], image["height"])).ravel()
        lines += " ".join([str(o["number"]), *(f"{v:.6f}" for v in values)]) + "\n"
    return lines


def to_voc(image: _Item, objects: list[_Item]) -> str:
    """Return Pascal VOC's XML, with boxes whose pixels count from 1."""
    content: list[tuple[str, Any]] = [("filename", image["file_name"])]
    content.append(("size", [("width", image["width"]), ("height", image["height"]), ("depth", 3)]))
    for o in objects:
        x, y, w, h = o["bbox"]
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h))
        box = [(key, f"{value:.2f}") for key, value in corners]
        content.append(("object", [("name", o["name"]), ("difficult", 0), ("bndbox", box)]))
    root = ElementTree.Element("annotation")
    _fill(root, content)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode")


def _fill(element: ElementTree.Element, content: Any) -> None:
    if not isinstance(content, list):
        element.text = str(content)
        return
    for key, value in content:
        _fill(ElementTree.SubElement(element, key), value)
