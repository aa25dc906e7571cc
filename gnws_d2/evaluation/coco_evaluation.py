"""Compute COCO box and mask AP by the official API."""

import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class COCOEvaluator(_COCOEvaluator):
    """
    Detectron2's :class:`COCOEvaluator` with the official implementation of AP. A model that finds
    nothing gets the official API's AP (0 for a class with objects) instead of NaN or no mask AP.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...], output_dir: str | None = None):
        """
        Args:
            dataset_name: a registered dataset with annotations in COCO format.
            tasks: some of "bbox", "segm" and "keypoints".
            output_dir: the directory of ``coco_instances_results.json``.
        """
        super().__init__(dataset_name, tasks, output_dir=output_dir, use_fast_impl=False)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        coco_eval = coco_eval or evaluate_results(self._coco_api, [], iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


def evaluate_results(coco: COCO, results: list[dict[str, Any]], task: str) -> COCOeval:
    """
    Return the official API's evaluation, accumulated and summarized (which prints the AP).

    Args:
        coco: the ground truth.
        results: the detections in COCO's results format, as in ``coco_instances_results.json``.
            May be empty.
        task: "bbox" or "segm".
    """
    if results:
        # The API adds keys to the dicts it is given.
        results = [dict(result) for result in results]
        return _evaluate_predictions_on_coco(coco, results, task, cocoeval_fn=COCOeval)
    no_predictions = COCO()  # the API's loadRes cannot read an empty list
    no_predictions.dataset = {**coco.dataset, "annotations": []}
    no_predictions.createIndex()
    coco_eval = COCOeval(coco, no_predictions, task)
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval


def results_json(output_dir: str, cfg: CfgNode, dataset_name: str) -> str:
    """
    Return the path of the predictions on a dataset of ``DATASETS.TEST``, in COCO's results format.

    Args:
        output_dir: ``OUTPUT_DIR`` of a run, which may have been moved.
    """
    # A directory for each dataset: Detectron2 would overwrite the results of the one before.
    name = dataset_name if len(cfg.DATASETS.TEST) > 1 else ""
    return os.path.join(output_dir, "inference", name, "coco_instances_results.json")
