"""Detections in the formats of other programs."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from ..utils.errors import UserError
from ..utils.files import atomic_write

if TYPE_CHECKING:
    import supervision


def to_supervision(instances: Instances, metadata: Metadata) -> "supervision.Detections":
    """
    Convert detections for `supervision <https://supervision.roboflow.com>`_.

    Args:
        instances: detections of a model, on any device.
        metadata: has ``thing_classes``, as that of a :class:`Predictor`.

    Returns:
        ``xyxy``, ``mask`` (None without masks), ``confidence``, ``class_id``, and
        ``data["class_name"]``.

    Raises:
        UserError: if supervision is not installed.
    """
    try:
        import supervision
    except ImportError as e:
        raise UserError("to_supervision needs the package supervision: install it by pip.") from e
    detections = supervision.Detections.from_detectron2({"instances": instances})
    detections.data["class_name"] = np.array(metadata.thing_classes)[detections.class_id]
    return detections


class CocoDetections:
    """Detections on several images as a dataset in COCO format, with scores."""

    def __init__(self, metadata: Metadata):
        """`metadata` has ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``."""
        ids = metadata.thing_dataset_id_to_contiguous_id  # in the order of the classes
        self.categories = [{"id": i, "name": name} for i, name in zip(ids, metadata.thing_classes)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, instances: Instances, **fields: Any) -> None:
        """Add an image, its detections on the CPU, and other keys, such as ``file_name``."""
        image_id, (height, width) = len(self.images) + 1, instances.image_size
        self.images.append({"id": image_id, **fields, "width": width, "height": height})
        areas = instances.pred_boxes.area()
        if instances.has("pred_masks"):
            areas = instances.pred_masks.sum(dim=(1, 2))
        for result, area in zip(instances_to_coco_json(instances, image_id), areas.tolist()):
            result["category_id"] = self.categories[result["category_id"]]["id"]
            result |= {"id": len(self.annotations) + 1, "area": area, "iscrowd": 0}
            self.annotations.append(result)

    def write(self, path: str, **info: str) -> None:
        """Write the dataset to a JSON file, with `info` under that key."""
        coco = {"info": info, "categories": self.categories, "images": self.images}
        with atomic_write(path) as f:
            json.dump({**coco, "annotations": self.annotations}, f)
