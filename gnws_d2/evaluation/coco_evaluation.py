"""
Compute COCO AP with hotcoco, which gives the numbers of pycocotools, the official API, in a tenth
of the time or less.
"""

import contextlib
import copy
import io
import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.signals import stop_together

try:
    import hotcoco
except ImportError:
    hotcoco = None  # type: ignore[assignment]

_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
_LONGEST = timedelta(days=7)  # of an evaluation


class COCOEvaluator(_COCOEvaluator):
    """
    Detectron2's :class:`COCOEvaluator` with hotcoco, or with pycocotools: see :func:`read_truth`. A
    model that finds nothing gets the official API's AP (0 for a class with objects) instead of NaN
    or no mask AP.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[str, ...],
        output_dir: str | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
    ):
        """
        Args:
            dataset_name: a registered dataset with annotations in COCO format.
            tasks: some of "bbox", "segm" and "keypoints".
            output_dir: the directory of ``coco_instances_results.json``.
            kpt_oks_sigmas: ``TEST.KEYPOINT_OKS_SIGMAS``.
        """
        super().__init__(
            dataset_name,
            tasks,
            output_dir=output_dir,
            use_fast_impl=False,
            kpt_oks_sigmas=kpt_oks_sigmas,
        )

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, Any]:
        """
        See Detectron2. The predictions are written before AP is computed, and the other processes
        wait for that longer than ``DISTRIBUTED.TIMEOUT``. Raises :class:`Stopped` in all processes
        if one of them has received a signal.
        """
        stop_together()  # before AP is computed of a part of the images
        predictions = comm.gather(self._predictions, dst=0)
        with _wait_for_main_process():
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain(*predictions))
            if self._output_dir:
                os.makedirs(self._output_dir, exist_ok=True)
            if any("proposals" in prediction for prediction in predictions):
                self._results: dict[str, Any] = OrderedDict()
                self._eval_box_proposals(predictions)
                return self._results
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
            return self.evaluate_results(results, img_ids)

    def evaluate_results(
        self, results: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> dict[str, Any]:
        """Compute AP of detections in COCO's results format, with the category ids of the file."""
        self._results = OrderedDict()
        if not self._do_evaluation:
            self._logger.info("There are no annotations to compute AP with.")
            return {}
        truth = read_truth(self._metadata.json_file)
        for task in self._tasks:
            self._logger.info(f"Computing AP, {task} ...")
            evaluation = evaluate_results(
                truth, results, task, img_ids, kpt_oks_sigmas=self._kpt_oks_sigmas
            )
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )
        return copy.deepcopy(self._results)


def read_truth(json_file: str) -> Any:
    """
    Read an annotation file for :func:`evaluate_results`, as :class:`hotcoco.COCO`, or as the
    :class:`COCO` of pycocotools, with the same methods, if hotcoco is not installed or does not
    support the file (ids that are strings, for example).
    """
    path, reason = PathManager.get_local_path(json_file), "hotcoco is not installed"
    if hotcoco is not None:
        try:
            return hotcoco.COCO(path)
        except ValueError as e:
            reason = f"hotcoco does not support the file: {e}"
    logging.getLogger(__name__).info(f"{json_file}: AP by pycocotools, which is slow; {reason}.")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def evaluate_results(
    truth: Any,
    results: list[dict[str, Any]],
    task: str,
    img_ids: list[int] | None = None,
    iou_threshold: float | None = None,
    kpt_oks_sigmas: Sequence[float] = (),
) -> Any:
    """
    Args:
        truth: the ground truth, of :func:`read_truth`.
        results: the detections in COCO's results format, as in ``coco_instances_results.json``.
            May be empty.
        task: "bbox", "segm" or "keypoints".
        img_ids: the images to evaluate on (default: all).
        iou_threshold: match at this IoU alone, objects of all sizes, without AP.
        kpt_oks_sigmas: the sigma of each keypoint (default: COCO's 17).

    Returns:
        hotcoco's or pycocotools' :class:`COCOeval`, evaluated, and, unless `iou_threshold` is
        given, accumulated and summarized.

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
        evaluation = _evaluator(truth, results, task)
        params = evaluation.params
        if img_ids is not None:
            params.imgIds = sorted(img_ids)
        if len(kpt_oks_sigmas):
            params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
        if iou_threshold is not None:
            params.iouThrs, params.areaRng = [iou_threshold], params.areaRng[:1]
            params.areaRngLbl = params.areaRngLbl[:1]
        evaluation.evaluate()
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"the results have another format: {e!r}") from e
    if iou_threshold is None:
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _evaluator(truth: Any, results: list[dict[str, Any]], task: str) -> Any:
    if not isinstance(truth, COCO):
        return hotcoco.COCOeval(truth, truth.loadRes(results), task)
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            return COCOeval(truth, truth.loadRes(results), task)
        no_detections = COCO()  # loadRes cannot read an empty list
        no_detections.dataset = {**truth.dataset, "annotations": []}
        no_detections.createIndex()
        return COCOeval(truth, no_detections, task)


@contextlib.contextmanager
def _wait_for_main_process() -> Iterator[None]:
    """Wait at the end of the context for all processes, longer than ``DISTRIBUTED.TIMEOUT``."""
    if comm.get_world_size() == 1:
        yield
        return
    group: Any = dist.new_group(backend="gloo", timeout=_LONGEST)
    try:
        yield
        dist.barrier(group)
    finally:
        dist.destroy_process_group(group)


def results_json(output_dir: str, cfg: CfgNode, dataset_name: str) -> str:
    """
    Return the path of the predictions on a dataset of ``DATASETS.TEST``, in COCO's results format.

    Args:
        output_dir: ``OUTPUT_DIR`` of a run, which may have been moved.
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
