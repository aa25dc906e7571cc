"""The evaluator of a dataset, for what the model predicts."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..utils.errors import UserError
from .coco_evaluation import COCOEvaluator, results_json

_COCO_KEYPOINTS = 17


def build_evaluator(cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
    """
    Build the evaluator of COCO's AP for boxes, masks and keypoints, as the model predicts them.

    Raises:
        UserError: if the dataset has another evaluator_type, such as LVIS's.
    """
    _check_type(dataset_name)
    tasks = ("bbox", *["segm"] * cfg.MODEL.MASK_ON, *["keypoints"] * cfg.MODEL.KEYPOINT_ON)
    output_dir = os.path.dirname(results_json(cfg.OUTPUT_DIR, cfg, dataset_name))
    return COCOEvaluator(dataset_name, tasks, output_dir, cfg.TEST.KEYPOINT_OKS_SIGMAS)


def check_evaluators(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if a dataset of ``DATASETS.TEST`` cannot be evaluated."""
    for name in cfg.DATASETS.TEST:
        _check_type(name)
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


def _check_type(dataset_name: str) -> None:
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type != "coco":
        raise UserError(
            f"The dataset {dataset_name} has the evaluator_type {evaluator_type}, but only coco is "
            "supported: convert it to COCO format."
        )
