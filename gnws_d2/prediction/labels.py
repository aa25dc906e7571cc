"""Detections as labels that people correct in their tool, and that ``--data`` reads again."""

import json
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml

from ..config import check_choice
from ..data.dataset_mapper import IMAGE_SUFFIXES, read_image
from ..data.formats.label import corners_of
from ..utils.errors import UserError
from .outlines import outline_mask
from .results import CocoDetections

_Item = dict[str, Any]  # a picture, or an object: COCO's with the name and number of its class


def _outline(annotation: _Item, one: bool = False) -> list[np.ndarray]:
    """The polygons of an object, (N, 2), or of an empty mask the box. `one`: join all parts."""
    if "segmentation" not in annotation:
        return []
    found = outline_mask(annotation["segmentation"], one)
    return found or [np.reshape(corners_of(annotation["bbox"]), (-1, 2))]


def _to_coco(annotation: _Item) -> _Item:
    """An annotation, without a score, and with polygons."""
    own = {k: v for k, v in annotation.items() if k not in ("score", "name", "number")}
    polygons = [polygon.ravel().tolist() for polygon in _outline(annotation)]
    if not polygons:
        return own
    points = np.reshape(np.concatenate(polygons), (-1, 2))
    box = [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
    return {**own, "segmentation": polygons, "bbox": box}


def _to_labelme(image: _Item, objects: list[_Item]) -> str:
    """Return labelme's JSON, where an object of several parts has a ``group_id``."""
    shapes = []
    for o in objects:
        x, y, w, h = o["bbox"]
        outlines = [("polygon", polygon.tolist()) for polygon in _outline(o)]
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


def _to_yolo(image: _Item, objects: list[_Item]) -> str:
    """Return a line for each object: a polygon, or a box's center and size."""
    lines = ""
    for o in objects:
        x, y, w, h = o["bbox"]
        points = [*_outline(o, one=True), np.array([[x + w / 2, y + h / 2], [w, h]])][0]
        values = (points / (image["width"], image["height"])).ravel()
        lines += " ".join([str(o["number"]), *(f"{v:.6f}" for v in values)]) + "\n"
    return lines


def _to_voc(image: _Item, objects: list[_Item]) -> str:
    """Return Pascal VOC's XML, with boxes whose pixels count from 1."""
    size = [("width", image["width"]), ("height", image["height"]), ("depth", 3)]
    content: list[tuple[str, Any]] = [("filename", image["file_name"]), ("size", size)]
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


# Where a picture has a label of its own: directories of pictures and labels, suffix and function.
_LAYOUTS: dict[str, tuple[str, str, str, Callable[..., str]]] = {
    "labelme": ("", "", ".json", _to_labelme),
    "yolo": ("images", "labels", ".txt", _to_yolo),
    "voc": ("JPEGImages", "Annotations", ".xml", _to_voc),
}
FORMATS = (*_LAYOUTS, "coco")


def labels_directory(directory: str, format: str) -> str:
    """
    Return ``DIRECTORY/labels_FORMAT``, which :func:`save_labels` writes. Raise :class:`UserError`
    if it exists, as it may hold corrections; or if the format is not known.
    """
    check_choice("--save-labels", format, FORMATS)
    path = os.path.join(directory, f"labels_{format}")
    if os.path.lexists(path):
        raise UserError(
            f"{path} exists, and is not overwritten, as it may hold corrections: move it away or "
            "name another --output."
        )
    return path


def save_labels(detections: CocoDetections, directory: str, format: str, image_root: str) -> None:
    """
    Write ``DIRECTORY/labels_FORMAT``, copies of the pictures with labels, which the tool opens and
    ``--data`` reads, once it is complete, and print what was written. `detections` are on pictures
    below `image_root`, not on frames, in coordinates after EXIF orientation.

    Raises:
        UserError: if ``labels_FORMAT`` exists or cannot be written, or a picture cannot be read.
    """
    target = labels_directory(directory, format)
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    images = list(_name_copies(detections.images, unique=format in _LAYOUTS))
    try:
        os.makedirs(part)
        pictures = os.path.join(part, _LAYOUTS[format][0] if format in _LAYOUTS else "")
        for name, image in images:
            source = os.path.join(image_root, name)
            copy = os.path.join(pictures, image["file_name"])
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            if source.lower().endswith(IMAGE_SUFFIXES):
                shutil.copy2(source, copy)
            else:
                cv2.imencode(".png", read_image(source, "BGR"))[1].tofile(copy)
        _write_labels(detections, part, format, [image for _, image in images])
        os.rename(part, target)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise UserError(f"Cannot write {target}: {where}{e.strerror or e}.") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    boxes = format == "voc" and any("segmentation" in a for a in detections.annotations)
    what = " (boxes only: Pascal VOC has no masks)" if boxes else ""
    print(f"{len(images)} pictures with labels to correct{what}: {target}")


def _name_copies(images: list[_Item], unique: bool) -> Iterator[tuple[str, _Item]]:
    """Yield each file, and its picture with the name of the copy; `unique`: without suffix, too."""
    taken: set[str] = set()
    for name, image in {image["file_name"]: image for image in images}.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES:  # which no tool takes for a picture
            stem, suffix = name, ".png"
        while (stem if unique else stem + suffix).lower() in taken:
            stem += f"_{suffix[1:]}"
        taken.add((stem if unique else stem + suffix).lower())
        yield name, {**image, "file_name": stem + suffix}


def _write_labels(detections: CocoDetections, root: str, format: str, images: list[_Item]) -> None:
    names = {category["id"]: category["name"] for category in detections.categories}
    numbers = {id: number for number, id in enumerate(names)}
    objects: dict[Any, list[_Item]] = defaultdict(list)
    for a in detections.annotations:
        id = a["category_id"]
        objects[a["image_id"]].append({**a, "name": names[id], "number": numbers[id]})
    if format == "coco":
        found = [_to_coco(o) for image in images for o in objects[image["id"]]]
        coco = {"categories": detections.categories, "images": images, "annotations": found}
        _write(os.path.join(root, "annotations.json"), json.dumps(coco))
        return
    _, directory, suffix, to_text = _LAYOUTS[format]
    for image in images:
        path = os.path.join(root, directory, os.path.splitext(image["file_name"])[0] + suffix)
        _write(path, to_text(image, objects[image["id"]]))
    if format == "yolo":
        data = {"train": "images", "val": "images", "names": list(names.values())}
        _write(os.path.join(root, "data.yaml"), yaml.safe_dump(data, allow_unicode=True))


def _write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(text.encode("utf-8", "replace"))  # names of files may be no text
