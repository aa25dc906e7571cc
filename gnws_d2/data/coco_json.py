"""Read annotation files in COCO's format."""

import json
import os
from collections import defaultdict
from typing import Any

import orjson
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..utils.errors import UserError
from ..utils.process import no_garbage_collection

COCO_ITEMS = {"categories": "category", "images": "image", "annotations": "annotation"}

_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")  # that Detectron2 takes as they are
_kept: dict[str, dict[str, Any]] = {}


def read_coco_json(json_file: str, *, keep: bool = False) -> dict[str, Any]:
    """
    Read an annotation file, with lists of dicts in "images", "categories" and "annotations".

    Args:
        keep: keep the content in memory for :func:`load_coco_json`, which takes it.

    Raises:
        UserError: if it cannot be read or has another format.
    """
    try:
        with PathManager.open(json_file, "rb") as f:
            text = f.read()
        with no_garbage_collection():
            try:
                content = orjson.loads(text)
            except ValueError:  # Python's reader takes NaN, and its errors tell more
                content = json.loads(text)
    except OSError as e:
        raise UserError(f"Cannot read the annotation file {json_file}: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"The annotation file {json_file} is not valid JSON: {e}.") from e
    # Sets for testing have no annotations.
    coco = {"annotations": [], **content} if isinstance(content, dict) else {}
    for key in COCO_ITEMS:
        items = coco.get(key)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{json_file} is not in COCO's instances format: no list {key!r}.")
        if not items and key != "annotations":
            raise UserError(f"{json_file} has nothing in {key!r}.")
    if keep:
        _kept[json_file] = coco
    return coco


@no_garbage_collection()
def load_coco_json(json_file: str, image_root: str, dataset_name: str) -> list[dict[str, Any]]:
    """
    Detectron2's :func:`load_coco_json`, in less time and memory: it uses what a check has read, and
    builds no index. Raises :class:`UserError`: see :func:`read_coco_json`.
    """
    coco = _kept.pop(json_file, None) or read_coco_json(json_file)
    categories = sorted(coco["categories"], key=lambda category: category["id"])
    class_of = {category["id"]: i for i, category in enumerate(categories)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=class_of,
    )
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    annotations = coco.pop("annotations")[::-1]
    while annotations:
        annotation = annotations.pop()  # and free it
        record = {key: annotation[key] for key in _KEYS if key in annotation}
        if segmentation := annotation.get("segmentation"):
            if isinstance(segmentation, list):
                segmentation = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
                if not segmentation:
                    continue
            elif isinstance(segmentation["counts"], list):
                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            record["segmentation"] = segmentation
        if keypoints := record.pop("keypoints", None):
            # From pixels to the coordinates of their centers, but for the visibility.
            record["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        record["bbox_mode"] = BoxMode.XYWH_ABS
        record["category_id"] = class_of[record["category_id"]]
        of_image[annotation["image_id"]].append(record)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": of_image[image["id"]],
        }
        for image in sorted(coco["images"], key=lambda image: image["id"])
    ]
