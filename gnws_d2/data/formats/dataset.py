"""What the formats share: the COCO dict of each split, image sizes, names of splits."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..dataset_mapper import IMAGE_SUFFIXES, image_size

Coco = dict[str, Any]


class Dataset:
    """Collect the images and objects of each split, with classes numbered as they come."""

    def __init__(self, root: str, classes: Iterable[str] = ()):
        self.root, self.classes = root, list(classes)
        self.splits: dict[str, Coco] = {}

    def add_image(self, file: str, split: str) -> dict[str, Any]:
        coco = self.splits.setdefault(split, {"images": [], "annotations": []})
        width, height = image_size(os.path.join(self.root, file))
        image = {"id": len(coco["images"]) + 1, "file_name": file, "width": width, "height": height}
        coco["images"].append(image)
        return image

    def add_object(self, split: str, image: dict[str, Any], name: str, **fields: Any) -> None:
        if name not in self.classes:
            self.classes.append(name)
        annotations = self.splits[split]["annotations"]
        category = self.classes.index(name) + 1
        own = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category}
        annotations.append({**own, **fields})

    def finish(self) -> dict[str, Coco]:
        for coco in self.splits.values():
            coco["categories"] = [{"id": i, "name": n} for i, n in enumerate(self.classes, 1)]
            complete_coco(coco)
        return self.splits


def complete_coco(coco: Coco) -> Coco:
    """Fill in ``bbox``, ``area`` and ``iscrowd`` where annotations lack them, in place."""
    sizes = {i.get("id"): (i.get("height"), i.get("width")) for i in coco["images"]}
    for number, annotation in enumerate(coco["annotations"], 1):
        annotation.setdefault("id", number)
        annotation.setdefault("iscrowd", 0)
        segmentation, size = annotation.get("segmentation"), sizes.get(annotation.get("image_id"))
        if segmentation and size and not {"bbox", "area"} <= annotation.keys():
            try:
                rle = to_rle(segmentation, *size)
                annotation.setdefault("bbox", mask_util.toBbox(rle).tolist())
                annotation.setdefault("area", float(mask_util.area(rle)))
            except (TypeError, ValueError, KeyError, AttributeError):  # found by the check
                continue
        elif "area" not in annotation and len(box := annotation.get("bbox") or []) == 4:
            annotation["area"] = box[2] * box[3]
    return coco


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    rle = segmentation
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.merge(rle) if isinstance(rle, list) else rle


def is_image(file: str) -> bool:
    return file.lower().endswith(IMAGE_SUFFIXES)


def split_of(file: str) -> str:
    """The split that a path names: "train", "val", "test" or "all"."""
    for word in re.split(r"[^a-z]+", file.lower()):
        if word.startswith("train") and word != "trainval":
            return "train"
        if word in ("val", "valid", "validation"):
            return "val"
        if word in ("test", "testing"):
            return "test"
    return "all"


def read_json(root: str, file: str) -> Any:
    try:
        return json.loads(Path(root, file).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
