"""Files of a trained model for other programs, checked against the model before they are there."""

import importlib.util
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN, build_model
from tabulate import tabulate
from torch import Tensor, nn

from ..checkpoint import GNWSCheckpointer, save_checkpoint
from ..data import OpenCVDatasetMapper
from ..data.dataset_mapper import IMAGE_SUFFIXES
from ..export.detections import Comparison, Detector, compare_detections, detect
from ..export.fold import fold_model
from ..export.onnx import load_onnx, save_onnx
from ..export.torchscript import load_torchscript, save_torchscript
from ..layers import WSConv2d
from ..modeling.keys import get_kernels
from ..utils.errors import RunError, UserError
from .benchmark import Variant, measure

# The files of each format; that of the weights is the first.
FORMATS = {
    "folded": ("model.pth", "config.yaml"),
    "torchscript": ("model.ts",),
    "onnx": ("model.onnx",),
}
_ONNX_PACKAGES = ("onnx", "onnxruntime")
# What a model in a TorchScript or ONNX file has in these keys, and why nothing else.
_IN_A_GRAPH: dict[str, tuple[tuple[Any, ...], str]] = {
    "TEST.AUG.ENABLED": ((False,), "a file is one run of the network, not one for each size"),
    "MODEL.KEYPOINT_ON": ((False,), "keypoints are none of its outputs"),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": (
        ([False] * 4,),
        "deformable convolutions are an operator of Detectron2, which other programs have not",
    ),
    "MODEL.PROPOSAL_GENERATOR.NAME": (("RPN",), "the network in a file makes its own proposals"),
    "MODEL.ROI_HEADS.NAME": (("StandardROIHeads",), "other heads are not known to work"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": (("ROIAlignV2", "ROIAlign"), "others are not known to work"),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": (("ROIAlignV2", "ROIAlign"), "others are not known to work"),
}
_NUM_IMAGES = 5  # of a directory


@dataclass
class Exported:
    """
    What was written, and how it compares with the model.

    Attributes:
        files: their paths, that of the weights first.
        comparisons: for each image.
        image_size: (H, W) of the first image, as the network gets it.
        model_bytes, file_bytes: of the model's parameters, and of the files together.
        model_seconds, file_seconds: for the first image, on the CPU.
    """

    files: list[str]
    comparisons: list[Comparison]
    image_size: tuple[int, int]
    model_bytes: int
    file_bytes: int
    model_seconds: float
    file_seconds: float


def export_model(cfg: CfgNode, format: str, output_dir: str, images: str) -> Exported:
    """
    Write a model to files in which the standardized weights stand in place of the trained ones, and
    which need nothing of this project. They are read back and must find what the model finds on
    `images` (:func:`compare_detections`); until then, nothing in `output_dir` changes. All is done
    on the CPU.

    Args:
        cfg: of a GN+WS model, with its ``MODEL.WEIGHTS``.
        format: one of :data:`FORMATS`.

            * folded: ``model.pth``, and ``config.yaml`` that names it, for stock Detectron2.
            * torchscript: ``model.ts``, from an image to a dict of tensors.
            * onnx: ``model.onnx``, from an image to tensors of the same names.

            An image is (3, H, W) uint8, in the order of ``INPUT.FORMAT``, of any size; the models
            expect it in that of ``INPUT.MIN_SIZE_TEST``. The outputs are those of :func:`detect`.
        output_dir: where the files go.
        images: a photograph with objects that the model finds, or a directory of them, of which
            the first five are used.

    Raises:
        UserError: if the model cannot be exported, ``MODEL.WEIGHTS`` does not fit it, or it finds
            nothing on `images`.
        RunError: if what was exported does not find the same.
    """
    _check_exportable(cfg, format)
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    model = build_model(on_cpu).eval()
    if not any(isinstance(m, WSConv2d) for m in model.modules()):
        raise UserError(
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, and no layer of the model has "
            "standardized weights: Detectron2's own tools export it."
        )
    mapper = OpenCVDatasetMapper(on_cpu, is_train=False)
    inputs = {path: mapper({"file_name": path})["image"] for path in _find_images(images)}
    GNWSCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS)
    image = next(iter(inputs.values()))
    original = partial(detect, model)

    names = FORMATS[format]
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export", dir=output_dir) as part:
            folded, stock = fold_model(model, on_cpu)
            paths = [os.path.join(part, name) for name in names]
            if format == "folded":
                stock.MODEL.DEVICE = cfg.MODEL.DEVICE
                stock.MODEL.WEIGHTS = os.path.abspath(os.path.join(output_dir, names[0]))
                exported = _write_folded(folded, stock, *paths)
            else:
                exported = _write_graph(folded, format, paths[0], image)
            comparisons = _compare(original, exported, inputs, cfg)
            variants = [
                # Our models on CPUs have the C library keep freed memory.
                Variant("model", partial(original, image), get_kernels(cfg) == "auto"),
                Variant("file", partial(exported, image)),
            ]
            measure(variants, torch.device("cpu"), turns=2, memory=False)
            file_bytes = sum(map(os.path.getsize, paths))
            for path, name in zip(paths, names):
                os.replace(path, os.path.join(output_dir, name))
    except OSError as e:
        raise UserError(f"Cannot write to --output {output_dir}: {e.strerror or e}.") from e
    return Exported(
        [os.path.join(output_dir, name) for name in names],
        comparisons,
        (image.shape[1], image.shape[2]),
        sum(p.numel() * p.element_size() for p in model.parameters()),
        file_bytes,
        *(variant.median for variant in variants),
    )


def format_table(exported: Exported) -> str:
    """
    Returns:
        Size and speed of the model and of what was exported, in Markdown, and what was checked.
    """
    rows = [
        [name, f"{size / 1e6:.1f}", f"{seconds:.4g}"]
        for name, size, seconds in (
            ("the model (eager)", exported.model_bytes, exported.model_seconds),
            (exported.files[0], exported.file_bytes, exported.file_seconds),
        )
    ]
    (h, w), threads = exported.image_size, torch.get_num_threads()
    header = ["", "size (MB)", f"s/im ({h} x {w}, CPU, threads: {threads})"]
    compared = exported.comparisons
    iou = min(c.min_iou for c in compared)
    score = max(c.max_score_difference for c in compared)
    return (
        f"{tabulate(rows, header, 'github', disable_numparse=True)}\n\n"
        f"The same {sum(c.matched for c in compared)} detections on {len(compared)} images: IoU "
        f"{iou:.5f} at least, scores within {score:.1e}."
    )


def _find_images(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES))
    if not names:
        raise UserError(f"The directory --images {path} has no images.")
    return [os.path.join(path, name) for name in names[:_NUM_IMAGES]]


def _check_exportable(cfg: CfgNode, format: str) -> None:
    if cfg.MODEL.META_ARCHITECTURE != GeneralizedRCNN.__name__:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, and only GeneralizedRCNN "
            "can be exported."
        )
    if format == "folded":
        return
    for key, (values, why) in _IN_A_GRAPH.items():
        value = cfg
        for name in key.split("."):
            value = value[name]
        if value not in values:
            raise UserError(
                f"{key} is {value}, which cannot be exported to {format}: {why}. Set it to "
                f"{' or '.join(map(str, values))}, or use --format folded."
            )
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(
            f"--format onnx needs packages that are not installed: pip install {' '.join(missing)}"
        )


def _write_folded(folded: nn.Module, stock: CfgNode, path: str, config_file: str) -> Detector:
    save_checkpoint({"model": folded.state_dict(), "weight_standardization": False}, path)
    with open(config_file, "w") as f:
        f.write(stock.dump())
    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(path)
    return partial(detect, model)


def _write_graph(folded: nn.Module, format: str, path: str, image: Tensor) -> Detector:
    try:
        with warnings.catch_warnings():
            # Of what is deprecated, and of what tracing may get wrong, which is checked.
            warnings.simplefilter("ignore")
            if format == "torchscript":
                save_torchscript(folded, path)
                return load_torchscript(path)
            # Of another size than the one that it is checked with.
            save_onnx(folded, image[:, ::2, ::2].contiguous(), path)
            return load_onnx(path)
    except OSError:
        raise
    except Exception as e:  # the exporters can fail in any way
        reason = " ".join(str(e).split())[:500]
        raise UserError(f"The model cannot be exported to {format}: {reason}") from e


def _compare(
    original: Detector, exported: Detector, inputs: dict[str, Tensor], cfg: CfgNode
) -> list[Comparison]:
    comparisons = []
    for path, image in inputs.items():
        expected = original(image)
        cut = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        if len(expected["scores"]) == cfg.TEST.DETECTIONS_PER_IMAGE:
            cut = max(cut, expected["scores"].min().item())
        try:
            actual = exported(image)
        except Exception as e:  # of TorchScript or ONNX Runtime
            reason = " ".join(str(e).split())[-500:]
            raise RunError(f"What was exported fails on {path}, and was deleted: {reason}") from e
        comparison = compare_detections(expected, actual, cut)
        if comparison.unmatched:
            raise RunError(
                f"What was exported does not find the same on {path}, and was deleted: of the "
                f"model's {comparison.expected} detections and its {comparison.actual}, "
                f"{comparison.unmatched} have no counterpart."
            )
        comparisons.append(comparison)
    if not any(comparison.matched for comparison in comparisons):
        raise UserError(
            f"The model finds nothing on {', '.join(inputs)}, so that what is exported cannot be "
            "checked: give --images with objects that it knows, or a lower "
            f"MODEL.ROI_HEADS.SCORE_THRESH_TEST (now {cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST})."
        )
    return comparisons
