"""Export a model, and verify the result before it is written."""

import logging
import math
import os
import warnings
from functools import partial

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import box_iou

from ..checkpoint import GNWSCheckpointer
from ..data import OpenCVDatasetMapper, check_datasets
from ..data.coco import dataset_classes
from ..prediction.picture import find_images
from ..utils.errors import RunError, UserError
from ..utils.files import atomic_write
from .formats import Detections, Detector, detect, fold_model, to_folded, to_onnx, to_torchscript
from .quantize import to_int8

logger = logging.getLogger(__name__)

_MAX_CALIBRATION_IMAGES = 100
# Two detections are the same within these limits: IoU of the boxes, difference of the scores and
# of the mask probabilities.
MIN_IOU, MAX_SCORE_DIFFERENCE, MAX_MASK_DIFFERENCE = 0.99, 1e-3, 1e-2


def export_model(
    cfg: CfgNode, format: str, output_dir: str, images: str, int8_max_drop: float | None = None
) -> int:
    """
    Write a model with folded weights to files that do not need this project, if it gives the same
    detections as before (:func:`compare_detections`). Everything runs on the CPU.

    Args:
        cfg: config of a GeneralizedRCNN, with its ``MODEL.WEIGHTS``.
        format: "folded": ``config.yaml`` and ``model.pth``, for stock Detectron2. "torchscript":
            ``model.ts``, or "onnx": ``model.onnx``, from an image to the tensors of :func:`detect`.
        output_dir: directory of the files.
        images: an image with objects that the model detects, or a directory, of which the first
            five are used.
        int8_max_drop: for "onnx": write ``model_int8.onnx`` instead (:func:`to_int8`), if no AP on
            the first dataset of ``DATASETS.TEST`` falls by more points. It is calibrated on up to
            100 of `images`.

    Returns:
        The number of detections that were compared.

    Raises:
        UserError: if the model cannot be exported or detects nothing on `images`, or if there is no
            dataset for int8.
        RunError: if the detections of the exported model differ, or if AP falls.
    """
    if format != "folded" and (cfg.TEST.AUG.ENABLED or cfg.MODEL.KEYPOINT_ON):
        raise UserError(f"--format {format} needs TEST.AUG.ENABLED and MODEL.KEYPOINT_ON False.")
    cfg = cfg.clone()
    cfg.defrost()
    classes = None
    if int8_max_drop is not None:
        if not cfg.DATASETS.TEST:
            raise UserError("DATASETS.TEST is empty: name a dataset to measure the AP of int8 on.")
        cfg.DATASETS.TEST = cfg.DATASETS.TEST[:1]
        check_datasets(cfg, ("TEST",))
        classes = dataset_classes(cfg.DATASETS.TEST[0])
    device, cfg.MODEL.DEVICE = cfg.MODEL.DEVICE, "cpu"
    model = build_model(cfg).eval()
    mapper = OpenCVDatasetMapper(cfg, is_train=False)
    paths = find_images(images)
    if not paths:
        raise UserError(f"There is no image at --images {images}.")
    inputs = {path: mapper({"file_name": path})["image"] for path in paths[:5]}
    image = inputs[paths[0]]
    checkpointer = GNWSCheckpointer(model, strict=True, classes=classes)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    classes = checkpointer.classes
    detector = partial(detect, model)
    folded, stock = fold_model(model, cfg)
    stock.MODEL.DEVICE = device
    stock.MODEL.WEIGHTS = os.path.abspath(os.path.join(output_dir, "model.pth"))
    try:
        with warnings.catch_warnings():
            # Deprecations, and possible mistakes of tracing, which are verified.
            warnings.simplefilter("ignore")
            if format == "folded":
                files, exported = to_folded(folded, stock, classes)
            elif format == "torchscript":
                files, exported = to_torchscript(folded, classes)
            else:  # traced with another image size than it is verified with
                files, exported = to_onnx(folded, image[:, ::2, ::2].contiguous(), classes)
        matched = _verify(detector, exported, inputs, cfg)
        logger.info(f"The exported model gives the same {matched} detections as the model.")
        if int8_max_drop is not None:
            step = math.ceil(len(paths) / _MAX_CALIBRATION_IMAGES)
            calibration = [mapper({"file_name": path})["image"] for path in paths[::step]]
            int8 = to_int8(cfg, files["model.onnx"], calibration, int8_max_drop)
            files = {"model_int8.onnx": int8}
        os.makedirs(output_dir, exist_ok=True)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f"--format {format} needs {e.name}: pip install onnx onnxruntime") from e
    except Exception as e:  # exporters and runtimes raise almost anything
        raise UserError(f"The export to {format} failed: {' '.join(str(e).split())[:500]}") from e
    for name, data in files.items():
        with atomic_write(os.path.join(output_dir, name), "wb") as f:
            f.write(data)
        logger.info(f"{name}: {len(data) / 1e6:.1f} MB")
    return matched


def _verify(model: Detector, exported: Detector, inputs: dict[str, Tensor], cfg: CfgNode) -> int:
    num_matched, threshold = 0, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
    for path, image in inputs.items():
        expected = model(image)
        is_full = len(expected["scores"]) == cfg.TEST.DETECTIONS_PER_IMAGE
        cut = max(threshold, expected["scores"].min().item()) if is_full else threshold
        matched, unmatched = compare_detections(expected, exported(image), cut)
        if unmatched:
            raise RunError(
                f"Nothing was written: on {path} {unmatched} detections of the exported model or "
                f"the model differ, and {matched} agree."
            )
        num_matched += matched
    if not num_matched:
        raise UserError(
            f"The model detects nothing on {', '.join(inputs)} to verify the export with: give "
            f"other --images, or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST ({threshold})."
        )
    return num_matched


def compare_detections(expected: Detections, actual: Detections, cut: float) -> tuple[int, int]:
    """
    Return how many of the `expected` detections (:func:`detect`) have a match in the `actual` ones
    on the same image, and how many on both sides have none. One that the other model may have just
    below `cut`, the score from which models keep detections, does not count as unmatched.
    """
    # Detectron2's postprocessing also drops empty boxes.
    expected, actual = (
        {k: v[Boxes(d["pred_boxes"]).nonempty()] for k, v in d.items()} for d in (expected, actual)
    )
    a, b = expected["scores"], actual["scores"]
    same = box_iou(expected["pred_boxes"], actual["pred_boxes"]) > MIN_IOU
    same &= (a[:, None] - b[None]).abs() < MAX_SCORE_DIFFERENCE
    same &= expected["pred_classes"][:, None] == actual["pred_classes"][None]
    if "pred_masks" in expected:
        i, j = same.nonzero(as_tuple=True)
        masks = (expected["pred_masks"][i] - actual["pred_masks"][j]).abs().flatten(1)
        same[i, j] = (masks < MAX_MASK_DIFFERENCE).all(dim=1)
    clear = cut + MAX_SCORE_DIFFERENCE
    missing = (a > clear) & ~same.any(dim=1)
    unexpected = (b > clear) & ~same.any(dim=0)
    return int(same.any(dim=1).sum()), int(missing.sum() + unexpected.sum())
