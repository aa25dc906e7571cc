"""Export a model and verify the result before writing it."""

import logging
import math
import os
import warnings
from functools import partial
from glob import escape, glob

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from ..checkpoint import GNWSCheckpointer
from ..data import OpenCVDatasetMapper, check_datasets
from ..data.coco import dataset_classes
from ..data.dataset_mapper import IMAGE_SUFFIXES
from ..utils.errors import RunError, UserError
from ..utils.files import atomic_write
from .detections import Detector, compare_detections, detect, seconds_per_image
from .fold import fold_model
from .formats import to_folded, to_onnx, to_torchscript
from .quantize import to_int8

logger = logging.getLogger(__name__)

_MAX_CALIBRATION_IMAGES = 100


def export_model(
    cfg: CfgNode, format: str, output_dir: str, images: str, int8_max_drop: float | None = None
) -> int:
    """
    Write a model with folded weights to files that need nothing of this project, if it gives the
    same detections as before (:func:`compare_detections`). Log sizes and speed, all on the CPU.

    Args:
        cfg: config of a GeneralizedRCNN, with its ``MODEL.WEIGHTS``.
        format: "folded": ``config.yaml`` and ``model.pth``, for stock Detectron2. "torchscript":
            ``model.ts``, or "onnx": ``model.onnx``, from an image to the tensors of :func:`detect`.
        output_dir: directory of the files.
        images: an image with objects that the model knows, or a directory, for its first five.
        int8_max_drop: of "onnx": write ``model_int8.onnx`` instead (:func:`to_int8`), if no AP on
            the first dataset of ``DATASETS.TEST`` falls by more points. It is calibrated on up to
            100 of `images`.

    Returns:
        The number of detections that were compared.

    Raises:
        UserError: if the model cannot be exported or finds nothing on `images`, or if int8 has no
            dataset.
        RunError: if the exported model gives other detections, or if AP falls.
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
    paths = [images]
    if os.path.isdir(images):
        found = glob(os.path.join(escape(images), "*"))
        paths = sorted(path for path in found if path.lower().endswith(IMAGE_SUFFIXES))
    if not paths:
        raise UserError(f"The directory --images {images} has no images.")
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
            # Deprecations, and what tracing may get wrong, which is verified.
            warnings.simplefilter("ignore")
            if format == "folded":
                files, exported = to_folded(folded, stock, classes)
            elif format == "torchscript":
                files, exported = to_torchscript(folded, classes)
            else:  # traced with another image size than it is verified with
                files, exported = to_onnx(folded, image[:, ::2, ::2].contiguous(), classes)
        matched = _verify(detector, exported, inputs, cfg)
        logger.info(f"The model and the exported one give the same {matched} detections.")
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
    if int8_max_drop is None:
        before, after = (seconds_per_image(f, image) for f in (detector, exported))
        size = sum(map(len, files.values())) / 1e6
        logger.info(
            f"{format}: {size:.1f} MB, {after:.3g} s/im on the CPU (before: {before:.3g} s/im)"
        )
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
                f"Nothing was written: on {path} the exported model has {matched} of the model's "
                f"detections, and {unmatched} differ."
            )
        num_matched += matched
    if not num_matched:
        raise UserError(
            f"The model finds nothing on {', '.join(inputs)} to verify the export with: give other "
            f"--images or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST ({threshold})."
        )
    return num_matched
