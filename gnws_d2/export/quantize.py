"""Quantize an ONNX model to int8 if it keeps its AP."""

import contextlib
import io
import logging
import tempfile
import timeit
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..data import OpenCVDatasetMapper
from ..evaluation import TASKS, COCOEvaluator
from ..utils.errors import RunError, UserError
from .formats import Detector, onnx_detector

logger = logging.getLogger(__name__)


def quantize_onnx(data: bytes, images: Sequence[Tensor]) -> bytes:
    """
    Quantize the convolutions of an ONNX model to int8 (QDQ format).

    Weights are int8 with a scale for each output channel. They use 7 bits, so that the 16-bit sums
    of CPUs without VNNI do not saturate. Activations are uint8: int8 ones are slower than float32
    in ONNX Runtime on x86.

    Args:
        data: an ONNX file of :func:`to_onnx`.
        images: images (3, H, W), the network's input, that give the ranges of the activations.

    Returns:
        An ONNX file with the same inputs and outputs.
    """
    from onnxruntime import quantization  # an optional requirement

    inputs = ({"image": image.numpy()} for image in images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(inputs, None)

    with tempfile.TemporaryDirectory() as tmp:
        source, target = Path(tmp, "model.onnx"), Path(tmp, "model_int8.onnx")
        source.write_bytes(data)
        quantization.quantize_static(
            source,
            target,
            Reader(),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return target.read_bytes()


def to_int8(cfg: CfgNode, data: bytes, images: Sequence[Tensor], max_drop: float) -> bytes:
    """
    Quantize an ONNX model (:func:`quantize_onnx`), and return its file. Log its AP on the first
    dataset of ``DATASETS.TEST``, its size and its speed, and those of the float32 model.

    Raises:
        RunError: if an AP falls by more than `max_drop` points.
        UserError: if the dataset has no objects.
    """
    logger.info(f"Quantizing with the ranges of activations on {len(images)} images ...")
    models = {"float32": data, "int8": quantize_onnx(data, images)}
    name, aps = cfg.DATASETS.TEST[0], {}
    for kind, model in models.items():
        detector = onnx_detector(model)
        aps[kind] = evaluate_detector(cfg, detector)
        seconds = min(timeit.repeat(partial(detector, images[0]), number=1))
        values = ", ".join(f"{TASKS[task]} AP {ap:.2f}" for task, ap in aps[kind].items())
        size = len(model) / 1e6
        logger.info(f"{kind} on {name}: {values}, {size:.1f} MB, {seconds:.3g} s/im on the CPU")
    for task, before in aps["float32"].items():
        after = aps["int8"][task]
        if not before - after <= max_drop:  # also for NaN
            raise RunError(
                f"Nothing was written: in int8, {TASKS[task]} AP on {name} falls from "
                f"{before:.2f} to {after:.2f}, by more than --max-drop {max_drop:g}."
            )
    return models["int8"]


def evaluate_detector(cfg: CfgNode, detector: Detector) -> dict[str, float]:
    """
    Return the AP of a detector on the first dataset of ``DATASETS.TEST``, as ``--eval-only``
    computes it: "bbox" and, for a Mask R-CNN, "segm". Raise :class:`UserError` without objects.
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
        fields: dict[str, Any] = dict(detector(inputs["image"]))
        fields["pred_boxes"] = Boxes(fields["pred_boxes"])
        instances = Instances(tuple(inputs["image"].shape[1:]), **fields)
        instances = detector_postprocess(instances, inputs["height"], inputs["width"])
        outputs.append({"instances": instances})
    return outputs
