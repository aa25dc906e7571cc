"""COCO box and mask AP by the official API, empty predictions included."""

from typing import Any

from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class COCOEvaluator(_COCOEvaluator):
    """
    Detectron2's :class:`COCOEvaluator` with the official implementation of AP, for the tasks it is
    told. A model that finds nothing gets what the official API gives it (AP 0 where there is
    something to find), not NaN, or no mask AP at all.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...], output_dir: str | None = None):
        """
        Args:
            dataset_name: a registered dataset with annotations in COCO format.
            tasks: of "bbox", "segm" and "keypoints".
            output_dir: where ``coco_instances_results.json`` is written.
        """
        super().__init__(dataset_name, tasks, output_dir=output_dir, use_fast_impl=False)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        coco_eval = coco_eval or evaluate_results(self._coco_api, [], iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


def evaluate_results(coco: COCO, results: list[dict[str, Any]], task: str) -> COCOeval:
    """
    Args:
        coco: the ground truth.
        results: in COCO's results format, as in ``coco_instances_results.json``.
        task: "bbox" or "segm".

    Returns:
        The official API's evaluation, accumulated and summarized.
    """
    if results:
        # The API adds keys to those that it is given.
        results = [dict(result) for result in results]
        return _evaluate_predictions_on_coco(coco, results, task, cocoeval_fn=COCOeval)
    no_predictions = COCO()  # which the API's loadRes cannot read
    no_predictions.dataset = {**coco.dataset, "annotations": []}
    no_predictions.createIndex()
    coco_eval = COCOeval(coco, no_predictions, task)
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval
