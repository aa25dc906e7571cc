"""A small built-in dataset in COCO format: synthetic images of coloured shapes."""

import json
import os
import tempfile
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock

from .coco import class_fields

CLASSES = ("circle", "square", "triangle")
IMAGE_SIZE = 128  # pixels
_SPLITS = {"shapes_train": (1000, 0), "shapes_val": (100, 1)}  # images, seed

# Number of corners, and the angle of the first when the shape stands upright. The circle is a
# polygon too, so that its mask is exact.
_CORNERS = {"circle": (32, 0.0), "square": (4, np.pi / 4), "triangle": (3, -np.pi / 2)}
_MAX_TILT = 0.3  # radians


def generate_shapes(output_dir: str, num_images: int, seed: int) -> None:
    """
    Draw images of a few separate shapes on a colour gradient, and write ``images/*.png`` and
    ``annotations.json`` with their polygons in `output_dir`, which must not exist. The same
    arguments always give the same files.
    """
    rng = np.random.RandomState(seed)
    os.makedirs(os.path.join(output_dir, "images"))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        left, right = rng.randint(0, 256, (2, 3))
        t = np.linspace(0, 1, IMAGE_SIZE)[None, :, None]
        image = np.repeat((1 - t) * left + t * right, IMAGE_SIZE, axis=0).astype(np.uint8)
        background = (left + right) / 2
        occupied = np.zeros((0, 3))  # x, y, radius of the shapes so far
        for _ in range(rng.randint(1, 7)):
            radius = rng.uniform(22, 40)
            center = rng.uniform(radius, IMAGE_SIZE - radius, 2)
            distance = np.linalg.norm(occupied[:, :2] - center, axis=1)
            if (distance < occupied[:, 2] + radius + 2).any():
                continue
            occupied = np.append(occupied, [[*center, radius]], axis=0)
            category = rng.randint(len(CLASSES))
            color = rng.randint(0, 256, 3)
            while np.abs(color - background).sum() < 240:
                color = rng.randint(0, 256, 3)
            n, first = _CORNERS[CLASSES[category]]
            angles = first + rng.uniform(-_MAX_TILT, _MAX_TILT) + 2 * np.pi * np.arange(n) / n
            polygon = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            # OpenCV counts from the centre of the first pixel, COCO from its corner.
            corners = np.round((polygon - 0.5) * 16).astype(np.int32)
            cv2.fillPoly(image, [corners], color.tolist(), shift=4)
            x0, y0 = polygon.min(axis=0)
            x1, y1 = polygon.max(axis=0)
            x, y = polygon.T
            area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
            annotation = {
                "id": len(annotations) + 1, "image_id": image_id, "category_id": int(category) + 1,
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "segmentation": [polygon.round(2).ravel().tolist()],
                "area": round(area, 2), "iscrowd": 0,
            }  # fmt: skip
            annotations.append(annotation)
        name = f"{image_id:06d}.png"
        cv2.imwrite(os.path.join(output_dir, "images", name), image)
        images.append(
            {"id": image_id, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    with open(os.path.join(output_dir, "annotations.json"), "w") as f:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, f)


def load_shapes(name: str) -> list[dict[str, Any]]:
    """
    Load "shapes_train" or "shapes_val", in Detectron2's dataset format, from its dataset directory
    (``$DETECTRON2_DATASETS``, or ``./datasets``), where it is generated on first use.
    """
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    root = os.path.join(datasets, name)
    os.makedirs(datasets, exist_ok=True)
    with file_lock(root):  # only one of several processes generates
        if not os.path.isdir(root):
            with tempfile.TemporaryDirectory(dir=datasets) as tmp:
                generate_shapes(os.path.join(tmp, name), *_SPLITS[name])
                os.rename(os.path.join(tmp, name), root)
    json_file = os.path.join(root, "annotations.json")
    image_root = os.path.join(root, "images")
    metadata = MetadataCatalog.get(name)
    metadata.set(image_root=image_root)
    if not hasattr(metadata, "json_file"):  # an evaluator that is built first sets its own
        metadata.set(json_file=json_file)
    return load_coco_json(json_file, image_root, name)


def register_shapes() -> None:
    """Register "shapes_train" and "shapes_val" in Detectron2's catalogs."""
    for name in _SPLITS:
        DatasetCatalog.register(name, lambda name=name: load_shapes(name))
        fields = class_fields(dict(enumerate(CLASSES, 1)))
        MetadataCatalog.get(name).set(evaluator_type="coco", **fields)
