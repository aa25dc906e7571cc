"""
YOLO: ``labels/a.txt`` for ``images/a.jpg``, with a class and a box or polygon in each line, from 0
to 1, and the names of the classes in a ``data.yaml``.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...utils.errors import UserError
from .dataset import Coco, Dataset, is_image, split_of


def find(root: str, files: list[str]) -> list[str]:
    """Return the label files of this format among the files below `root`."""
    return [f for f in files if f.endswith(".txt") and "labels" in Path(f).parts[:-1]]


def read(root: str, files: list[str], own: list[str]) -> dict[str, Coco]:
    """See :func:`.read_dataset`; `own` are the files that :func:`find` returns."""
    dataset = Dataset(root, _yolo_classes(root, files))
    labels = {os.path.splitext(file)[0]: file for file in own}
    for file in filter(is_image, files):
        if "images" not in Path(file).parts[:-1]:
            continue
        parts = list(Path(os.path.splitext(file)[0]).parts)
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        split = split_of(os.path.dirname(file))
        image = dataset.add_image(file, split)
        label = labels.pop(os.path.join(*parts), None)  # none: a picture without objects
        lines = Path(root, label).read_text().splitlines() if label else []
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{os.path.join(root, label or '')}, line {number}"
                _add_yolo_object(dataset, split, image, line, where)
    if labels:
        label = next(iter(labels.values()))
        raise UserError(
            f"{os.path.join(root, label)} has no image: the image of labels/NAME.txt is "
            "images/NAME.jpg."
        )
    return dataset.finish()


def _yolo_classes(root: str, files: list[str]) -> list[str]:
    for file in files:
        if file.endswith((".yaml", ".yml")):
            try:
                content = yaml.safe_load(Path(root, file).read_text())
            except (ValueError, yaml.YAMLError) as e:
                raise UserError(f"{os.path.join(root, file)} is not valid YAML: {e}") from e
            names = content.get("names") if isinstance(content, dict) else None
            if isinstance(names, dict):
                names = [names[key] for key in sorted(names, key=int)]
            if names:
                return list(map(str, names))
    for name in ("classes.txt", "obj.names"):
        if name in files:
            return [c for c in Path(root, name).read_text().splitlines() if c.strip()]
    raise UserError(f"--data {root} has YOLO labels, but no data.yaml with the 'names' of classes.")


def _add_yolo_object(
    dataset: Dataset, split: str, image: dict[str, Any], line: str, where: str
) -> None:
    try:
        number, *values = map(float, line.split())
        name = dataset.classes[int(number)]
    except (ValueError, IndexError):
        raise UserError(
            f"{where}: {line!r} is not the number of a class and coordinates from 0 to 1."
        ) from None
    scale = np.array([image["width"], image["height"]])
    if len(values) == 4:
        center, size = np.reshape(values, (2, 2)) * scale
        dataset.add_object(split, image, name, bbox=[*(center - size / 2), *size])
    elif len(values) >= 6 and len(values) % 2 == 0:
        polygon = np.reshape(values, (-1, 2)) * scale
        dataset.add_object(split, image, name, segmentation=[polygon.ravel().tolist()])
    else:
        raise UserError(f"{where}: {len(values)} coordinates are neither a box (4) nor a polygon.")
