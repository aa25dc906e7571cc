"""AP of an exported model."""

import contextlib
import io
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from ..data import OpenCVDatasetMapper
from ..evaluation import COCOEvaluator
from ..utils.errors import UserError
from .detections import Detector


def evaluate_detector(cfg: CfgNode, detector: Detector) -> dict[str, float]:
    """
    Return the AP of a detector on the first dataset of ``DATASETS.TEST``, as ``--eval-only``
    computes it: "bbox" and, of a Mask R-CNN, "segm".

    Raises:
        UserError: if the dataset has no objects.
    """
    name = cfg.DATASETS.TEST[0]
    loader = build_detection_test_loader(cfg, name, mapper=OpenCVDatasetMapper(cfg, False))
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    evaluator = COCOEvaluator(name, tasks, use_fast_impl=False)
    with contextlib.redirect_stdout(io.StringIO()):  # the tables of AP
        results = inference_on_dataset(partial(_predict, detector), loader, evaluator)
    ap = {task: float(metrics["AP"]) for task, metrics in (results or {}).items()}
    if not ap or any(value != value for value in ap.values()):  # NaN
        raise UserError(f"The dataset {name} has no objects to compute AP with.")
    return ap


def _predict(detector: Detector, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a :class:`GeneralizedRCNN` returns for a batch."""
    outputs = []
    for inputs in batch:
        image = inputs["image"]
        fields: dict[str, Any] = dict(detector(image))
        fields["pred_boxes"] = Boxes(fields["pred_boxes"])
        instances = Instances((image.shape[1], image.shape[2]), **fields)
        size = inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2])
        outputs.append({"instances": detector_postprocess(instances, *size)})
    return outputs
