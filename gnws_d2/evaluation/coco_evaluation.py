"""COCO AP by hotcoco: the numbers of pycocotools, the official API, in a tenth of the time."""

import contextlib
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hotcoco
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
from detectron2.evaluation import print_csv_format
from detectron2.utils.file_io import PathManager

from ..checkpoint.files import THRESHOLD_FILE
from ..data.check import read_coco_json
from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.signals import stop_together
from .threshold import best_thresholds

_COCO_KEYPOINTS, _COCO_MAX_DETS = 17, 100
_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
TASKS = {"bbox": "box", "segm": "mask"}  # what AP is of, for people


class COCOEvaluator(_COCOEvaluator):
    """
    Detectron2's :class:`COCOEvaluator` with hotcoco. A model that finds nothing gets the official
    API's AP (0 for a class with objects) instead of NaN or no mask AP. `tasks` is required. The
    best thresholds go to `threshold_file`, if that is set: see :func:`write_thresholds`.
    """

    threshold_file = ""

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, Any]:
        """See Detectron2. Raise :class:`Stopped` in all processes after a signal in any."""
        stop_together()  # before AP is computed on a part of the images
        return super().evaluate(img_ids)

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> None:
        results = list(itertools.chain(*(p["instances"] for p in predictions)))
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        category_ids = {contiguous_id: id for id, contiguous_id in ids.items()}
        for result in results if ids else ():
            result["category_id"] = category_ids[result["category_id"]]
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            self._logger.info(f"Saving {len(results):,} predictions to {path}.")
            with atomic_write(path) as f:
                f.write(json.dumps(results))  # faster than json.dump
        self._results |= self.evaluate_results(results, img_ids)
        if self.threshold_file and self._do_evaluation:
            write_thresholds(self._metadata.json_file, results, self.threshold_file)

    def evaluate_results(
        self, results: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> dict[str, Any]:
        """Compute AP of detections with the category ids of the file; may raise ValueError."""
        if not self._do_evaluation:
            self._logger.info("There are no annotations to compute AP with.")
            return {}
        truth, ap = read_truth(self._metadata.json_file), {}
        for task in self._tasks:
            self._logger.info(f"Computing AP, {task} ...")
            evaluation = evaluate_results(
                truth,
                results,
                task,
                img_ids,
                kpt_oks_sigmas=self._kpt_oks_sigmas,
                max_dets=self._max_dets_per_image[-1],
            )
            ap[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )
        return ap


def build_evaluator(cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
    """
    Build the evaluator of COCO AP for what the model predicts: boxes, masks and keypoints. Raise
    :class:`UserError` if the dataset has another evaluator_type, such as LVIS's.
    """
    _check_type(dataset_name)
    evaluator = COCOEvaluator(
        dataset_name,
        ("bbox", *["segm"] * cfg.MODEL.MASK_ON, *["keypoints"] * cfg.MODEL.KEYPOINT_ON),
        output_dir=os.path.dirname(results_json(cfg.OUTPUT_DIR, cfg, dataset_name)),
        use_fast_impl=False,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        max_dets_per_image=max_dets(cfg, dataset_name),
    )
    if dataset_name == cfg.DATASETS.TEST[0]:
        evaluator.threshold_file = os.path.join(cfg.OUTPUT_DIR, THRESHOLD_FILE)
    return evaluator


def max_dets(cfg: CfgNode, dataset_name: str) -> int:
    """
    Return the number of detections in an image that AP counts: COCO's 100, and on other datasets
    all that the model may give (``TEST.DETECTIONS_PER_IMAGE``).
    """
    is_coco = dataset_name.startswith("coco_")
    return _COCO_MAX_DETS if is_coco else max(_COCO_MAX_DETS, cfg.TEST.DETECTIONS_PER_IMAGE)


def evaluate_predictions(cfg: CfgNode) -> dict[str, Any]:
    """
    Compute the AP of the file ``TEST.PREDICTIONS`` on the dataset of ``DATASETS.TEST``. Raise
    :class:`UserError` if the file cannot be read, or does not fit the dataset.
    """
    (name,) = cfg.DATASETS.TEST
    DatasetCatalog.get(name)  # fills in the class names
    results = read_results(cfg.TEST.PREDICTIONS)
    try:
        ap = build_evaluator(cfg, name).evaluate_results(results)
    except ValueError as e:
        raise UserError(f"{cfg.TEST.PREDICTIONS} does not fit the dataset {name}: {e}.") from e
    print_csv_format(ap)
    return ap


def check_evaluators(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if a dataset of ``DATASETS.TEST`` cannot be evaluated."""
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    num_sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or _COCO_KEYPOINTS
    for name in cfg.DATASETS.TEST:
        _check_type(name)
        if cfg.MODEL.KEYPOINT_ON and num_sigmas != num_keypoints:
            raise UserError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_keypoints}, but "
                f"TEST.KEYPOINT_OKS_SIGMAS has {num_sigmas} values: give one for each keypoint."
            )


def _check_type(dataset_name: str) -> None:
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type != "coco":
        raise UserError(
            f"The dataset {dataset_name} has the evaluator_type {evaluator_type}, but only coco is "
            "supported: convert it to COCO format."
        )


def read_truth(json_file: str) -> hotcoco.COCO:
    """
    Read an annotation file for :func:`evaluate_results`. Raise :class:`UserError` as
    :func:`read_coco_json`, or if hotcoco does not support it, as with ids that are strings.
    """
    with contextlib.suppress(ValueError, OSError):  # it reads most files itself, and faster
        return hotcoco.COCO(PathManager.get_local_path(json_file))
    coco = read_coco_json(json_file)
    try:  # without "licenses": null, which Detectron2 writes
        return hotcoco.COCO({key: coco[key] for key in ("images", "annotations", "categories")})
    except ValueError as e:
        raise UserError(f"hotcoco cannot read the annotation file {json_file}: {e}.") from e


def evaluate_results(
    truth: hotcoco.COCO,
    results: list[dict[str, Any]],
    task: str,
    img_ids: list[int] | None = None,
    iou_threshold: float | None = None,
    kpt_oks_sigmas: Sequence[float] = (),
    max_dets: int | None = None,
) -> hotcoco.COCOeval:
    """
    Args:
        truth: the ground truth, of :func:`read_truth`.
        results: the detections in COCO's results format, as in ``coco_instances_results.json``.
            May be empty.
        task: "bbox", "segm" or "keypoints".
        img_ids: the images to evaluate on (default: all).
        iou_threshold: match at this IoU alone, objects of all sizes, without AP.
        kpt_oks_sigmas: the sigma of each keypoint (default: COCO's 17).
        max_dets: the number of detections in an image that count (default: as many as `results`
            have in one, and at least COCO's 100).

    Returns:
        The evaluation, with accumulated and summarized AP unless `iou_threshold` is given.

    Raises:
        ValueError: if the results are not of the dataset, or have another format.
    """
    # With a box, the API takes its area for the area of the mask. It also adds keys.
    left_out = "bbox" if task == "segm" else None
    try:
        results = [{k: v for k, v in result.items() if k != left_out} for result in results]
        if not {r["image_id"] for r in results} <= set(truth.getImgIds()):
            raise ValueError("there are results of other images")
        if not all(_FIELDS[task] in result for result in results):
            raise ValueError(f"there are results without {_FIELDS[task]}")
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"the results have another format: {e!r}") from e
    evaluation = hotcoco.COCOeval(truth, truth.loadRes(results), task)
    params = evaluation.params
    most = max(Counter(result["image_id"] for result in results).values(), default=0)
    if task != "keypoints":  # COCO counts 20
        params.maxDets = [1, 10, max_dets or max(_COCO_MAX_DETS, most)]
    if img_ids is not None:
        params.imgIds = sorted(img_ids)
    if len(kpt_oks_sigmas):
        params.kpt_oks_sigmas = list(kpt_oks_sigmas)
    if iou_threshold is not None:
        params.iouThrs, params.areaRng = [iou_threshold], params.areaRng[:1]
        params.areaRngLbl = params.areaRngLbl[:1]
    evaluation.evaluate()
    if iou_threshold is None:
        evaluation.accumulate()
        with warnings.catch_warnings():  # of another number of detections than 100
            warnings.simplefilter("ignore", UserWarning)
            evaluation.summarize()
    return evaluation


def write_thresholds(json_file: str, results: list[dict[str, Any]], path: str) -> None:
    """Write :func:`best_thresholds` to the JSON file `path`, or remove it if there are none."""
    evaluation = evaluate_results(read_truth(json_file), results, "bbox", iou_threshold=0.5)
    best, classes = best_thresholds(evaluation)
    if best is None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return
    of_classes = {name: point.threshold for name, point in classes.items() if point}
    with atomic_write(path) as f:
        json.dump({"threshold": best.threshold, "classes": of_classes}, f, indent=2)


def results_json(output_dir: str, cfg: CfgNode, dataset_name: str) -> str:
    """
    Return the path of the predictions on a dataset of ``DATASETS.TEST``, in COCO's results format.
    `output_dir` is ``OUTPUT_DIR`` of a run, which may have been moved.
    """
    # A directory for each dataset: Detectron2 would overwrite the results of the one before.
    name = dataset_name.lstrip(os.sep) if len(cfg.DATASETS.TEST) > 1 else ""
    return os.path.join(output_dir, "inference", name, "coco_instances_results.json")


def read_results(json_file: str) -> list[dict[str, Any]]:
    """Read ``coco_instances_results.json``; raise :class:`UserError` if that is not possible."""
    try:
        with open(json_file) as f:
            return json.load(f)
    except OSError as e:
        raise UserError(f"Cannot read the predictions {json_file}: {e.strerror}.") from e
    except ValueError as e:
        raise UserError(f"{json_file} is not valid JSON ({e}): evaluate again.") from e
