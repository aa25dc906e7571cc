"""Detections as labels that people correct in their tool, and that ``--data`` reads again."""

import json
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import yaml

from ..config import check_choice
from ..data.dataset_mapper import IMAGE_SUFFIXES, read_image
from ..utils.errors import UserError
from .label_formats import to_coco, to_labelme, to_voc, to_yolo
from .results import CocoDetections

FORMATS = ("labelme", "yolo", "voc", "coco")
# Where a picture has a label of its own: directories of pictures and labels, suffix and function.
_LAYOUTS: dict[str, tuple[str, str, str, Callable[..., str]]] = {
    "labelme": ("", "", ".json", to_labelme),
    "yolo": ("images", "labels", ".txt", to_yolo),
    "voc": ("JPEGImages", "Annotations", ".xml", to_voc),
}


def labels_directory(directory: str, format: str) -> str:
    """
    Return ``DIRECTORY/labels_FORMAT``, which :func:`save_labels` writes.

    Raises:
        UserError: if it exists, as it may hold corrections; or if the format is not known.
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
    ``--data`` reads. It appears once it is complete. Print what was written.

    Args:
        detections: on pictures, not frames. Coordinates are those after EXIF orientation.
        directory: ``--output``.
        format: one of :data:`FORMATS`.
        image_root: the directory of the pictures.

    Raises:
        UserError: if ``labels_FORMAT`` exists or cannot be written, or a picture cannot be read.
    """
    target = labels_directory(directory, format)
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    images = list(_name_copies(detections.images, unique=format in _LAYOUTS))
    try:
        os.makedirs(part)
        for source, image in images:
            pictures = _LAYOUTS[format][0] if format in _LAYOUTS else ""
            _copy(
                os.path.join(image_root, source), os.path.join(part, pictures, image["file_name"])
            )
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


def _name_copies(
    images: list[dict[str, Any]], unique: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the file of each picture, and the picture with the name of its copy. If `unique`, no two
    names differ by their suffix only.
    """
    taken: set[str] = set()
    for name, image in {image["file_name"]: image for image in images}.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES:  # which no tool takes for a picture
            stem, suffix = name, ".png"
        while (stem if unique else stem + suffix).lower() in taken:
            stem += f"_{suffix[1:]}"
        taken.add((stem if unique else stem + suffix).lower())
        yield name, {**image, "file_name": stem + suffix}


def _copy(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if source.lower().endswith(IMAGE_SUFFIXES):
        shutil.copy2(source, target)
    else:
        cv2.imencode(".png", read_image(source, "BGR"))[1].tofile(target)


def _write_labels(
    detections: CocoDetections, root: str, format: str, images: list[dict[str, Any]]
) -> None:
    names = {category["id"]: category["name"] for category in detections.categories}
    numbers = {id: number for number, id in enumerate(names)}
    objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for a in detections.annotations:
        class_ = {"name": names[a["category_id"]], "number": numbers[a["category_id"]]}
        objects[a["image_id"]].append({**a, **class_})
    if format == "coco":
        found = [to_coco(o) for image in images for o in objects[image["id"]]]
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
