"""Datasets of one's own, in COCO format."""

import json
import logging
import math
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from ..utils.errors import UserError


def register_coco_datasets(datasets: list[list[str]]) -> None:
    """
    Register datasets for use in ``DATASETS.TRAIN`` and ``DATASETS.TEST``. Reads no file.

    Args:
        datasets: (name, annotation file, image directory) of each.

    Raises:
        UserError: if a name is already taken by another dataset.
    """
    for name, json_file, image_root in datasets:
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, json_file, image_root)
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file"), metadata.get("image_root")) != (json_file, image_root):
            raise UserError(
                f"--dataset {name}: a dataset of this name exists, choose another name."
            )


def check_coco_json(json_file: str, image_root: str) -> list[str]:
    """
    Check an annotation file, and that its images exist, without opening an image.

    Returns:
        The names of its classes, in the order of their ids, as Detectron2 numbers them.

    Raises:
        UserError: for the first fault. It names the file and the id of the annotation or image.
    """
    try:
        with PathManager.open(json_file) as f:
            coco = json.load(f)
        images: dict[Any, dict[str, Any]] = {image["id"]: image for image in coco["images"]}
        categories = {category["id"]: category["name"] for category in coco["categories"]}
        _check_annotations(coco.get("annotations", []), images, categories, json_file)
        for image in images.values():
            path = os.path.join(image_root, image["file_name"])
            if not PathManager.isfile(path):
                raise UserError(
                    f"{json_file}: the file of image id {image['id']} does not exist: {path}."
                )
    except OSError as e:
        raise UserError(f"Cannot read the annotation file {json_file}: {e.strerror}.") from e
    except ValueError as e:
        raise UserError(f"The annotation file {json_file} is not valid JSON: {e}.") from e
    except (KeyError, TypeError) as e:
        raise UserError(f"{json_file} is not in COCO's instances format: {e!r}.") from e
    return [categories[i] for i in sorted(categories)]


def _check_annotations(
    annotations: list[dict[str, Any]],
    images: dict[Any, dict[str, Any]],
    categories: dict[Any, str],
    json_file: str,
) -> None:
    clipped = []
    for annotation in annotations:
        where = f"{json_file}: annotation id {annotation['id']}"
        image_id, category_id = annotation["image_id"], annotation["category_id"]
        if image_id not in images:
            raise UserError(f"{where} is of image id {image_id}, which is not in 'images'.")
        if category_id not in categories:
            raise UserError(f"{where} has category id {category_id}, which is not in 'categories'.")
        bbox = annotation["bbox"]
        if len(bbox) != 4 or not all(math.isfinite(v) for v in bbox):
            raise UserError(f"{where} has the box {bbox}, which is not four finite numbers.")
        x, y, w, h = bbox
        width, height = images[image_id]["width"], images[image_id]["height"]
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise UserError(
                f"{where} has the box {bbox} (x, y, width, height), which is outside its image "
                f"id {image_id} of {width}x{height}."
            )
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            clipped.append(annotation["id"])
    if clipped:
        logging.getLogger(__name__).warning(
            f"{json_file}: {len(clipped)} boxes reach over the edge of their image and will be "
            f"clipped; the first is of annotation id {clipped[0]}."
        )
