"""COCO box and mask AP by the official API, empty predictions included."""

from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
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
        if coco_eval is None:  # no predictions, which the API's loadRes cannot read
            no_predictions = COCO()
            no_predictions.dataset = {**self._coco_api.dataset, "annotations": []}
            no_predictions.createIndex()
            coco_eval = COCOeval(self._coco_api, no_predictions, iou_type)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
        return super()._derive_coco_results(coco_eval, iou_type, class_names)
