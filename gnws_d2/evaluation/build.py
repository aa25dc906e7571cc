"""The evaluator of a dataset, as in Detectron2's ``tools/train_net.py``."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator

from ..utils.errors import UserError
from .coco_evaluation import COCOEvaluator, results_json

_TYPES = ("coco", "lvis")  # evaluator_type in the metadata of a dataset
_COCO_KEYPOINTS = 17


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """
    Build the evaluator of the dataset's ``evaluator_type``, for what the model predicts.

    Raises:
        UserError: if that type is not supported.
    """
    evaluator_type = _find_type(dataset_name)
    tasks = ("bbox", *["segm"] * cfg.MODEL.MASK_ON, *["keypoints"] * cfg.MODEL.KEYPOINT_ON)
    output_dir = os.path.dirname(results_json(cfg.OUTPUT_DIR, cfg, dataset_name))
    if evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, tasks, output_dir=output_dir)
    return COCOEvaluator(dataset_name, tasks, output_dir, cfg.TEST.KEYPOINT_OKS_SIGMAS)


def check_evaluators(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if a dataset of ``DATASETS.TEST`` cannot be evaluated."""
    for name in cfg.DATASETS.TEST:
        _find_type(name)
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    num_sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or _COCO_KEYPOINTS
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if cfg.MODEL.KEYPOINT_ON else ():
        number = len(MetadataCatalog.get(name).get("keypoint_names", ()))
        if not number == num_keypoints == num_sigmas:
            raise UserError(
                f"The dataset {name} has {number} keypoint_names in its metadata, but "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_keypoints}, and "
                f"TEST.KEYPOINT_OKS_SIGMAS has {num_sigmas} values: give as many of each."
            )


def _find_type(dataset_name: str) -> str:
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type not in _TYPES:
        raise UserError(
            f"The dataset {dataset_name} has the evaluator_type {evaluator_type}, but only "
            f"{' and '.join(_TYPES)} are supported: convert it to COCO format."
        )
    return evaluator_type
