"""Quantization of an ONNX model to int8, if its AP is kept."""

import logging
import os
import tempfile
from collections.abc import Sequence

from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor

from ..utils.errors import RunError
from .detections import seconds_per_image
from .evaluate import evaluate_detector
from .formats import onnx_detector

logger = logging.getLogger(__name__)

_AP_NAMES = {"bbox": "box AP", "segm": "mask AP"}


def quantize_onnx(data: bytes, images: Sequence[Tensor]) -> bytes:
    """
    Quantize the convolutions of an ONNX model to int8 (QDQ format).

    Weights are int8 with a scale for each output channel, of 7 bits so that the 16-bit sums of CPUs
    without VNNI do not saturate. Activations are uint8: int8 ones are slower than float32 in ONNX
    Runtime on x86.

    Args:
        data: an ONNX file of :func:`to_onnx`.
        images: images (3, H, W), the network's input, that give the ranges of the activations.

    Returns:
        An ONNX file with the same inputs, outputs and metadata.
    """
    import onnx  # optional requirements
    from onnxruntime import quantization
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.images = iter(images)

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {"image": image.numpy()}

    proto = onnx.load_from_string(data)
    metadata = list(proto.metadata_props)
    # Against the advice, as a warning, to preprocess the model, of which it needs nothing.
    add_pre_process_metadata(proto)
    with tempfile.TemporaryDirectory() as tmp:
        source, target = os.path.join(tmp, "model.onnx"), os.path.join(tmp, "model_int8.onnx")
        onnx.save(proto, source)
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
        quantized = onnx.load(target)
    del quantized.metadata_props[:]  # those of the quantization
    quantized.metadata_props.extend(metadata)
    return quantized.SerializeToString()


def to_int8(cfg: CfgNode, data: bytes, images: Sequence[Tensor], max_drop: float) -> bytes:
    """
    Quantize an ONNX model (:func:`quantize_onnx`), and log its AP on the first dataset of
    ``DATASETS.TEST``, size and speed beside those of the float32 model.

    Returns:
        The ONNX file of the quantized model.

    Raises:
        RunError: if an AP falls by more than `max_drop` points.
        UserError: if the dataset has no objects.
    """
    logger.info(f"Quantizing, with the ranges of activations on {len(images)} images ...")
    models = {"float32": data, "int8": quantize_onnx(data, images)}
    name = cfg.DATASETS.TEST[0]
    aps, columns = [], {}
    for kind, model in models.items():
        logger.info(f"Evaluating the {kind} model on {name} ...")
        detector = onnx_detector(model)
        ap, seconds = evaluate_detector(cfg, detector), seconds_per_image(detector, images[0])
        aps.append(ap)
        columns[kind] = [f"{value:.2f}" for value in ap.values()]
        columns[kind] += [f"{len(model) / 1e6:.1f}", f"{seconds:.3g}"]
    before, after = aps
    rows = [*(_AP_NAMES[task] for task in before), "MB", "s/im, CPU"]
    table = tabulate(columns, headers=[name, *columns], showindex=rows, disable_numparse=True)
    logger.info(f"AP, size and speed:\n{table}")
    worst = max(before, key=lambda task: before[task] - after[task])
    if before[worst] - after[worst] > max_drop:
        raise RunError(
            f"Nothing was written: in int8, {_AP_NAMES[worst]} on {name} falls from "
            f"{before[worst]:.2f} to {after[worst]:.2f}, by more than --max-drop {max_drop:g}."
        )
    return models["int8"]
