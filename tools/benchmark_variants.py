"""Measure one variant, in a process that ``tools/benchmark.py`` starts."""

import argparse
import gc
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import cli  # noqa: F401  (before Detectron2, whose warnings it filters)

# isort: split
import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn import functional as F

from gnws_d2.config import check_device, load_config
from gnws_d2.data import OpenCVDatasetMapper, register_coco_datasets
from gnws_d2.engine.run_record import describe_machine
from gnws_d2.export.fold import STOCK_NAMES, fold_model
from gnws_d2.layers import (
    WSConv2d,
    fold_for_inference,
    group_norm,
    standardize_weight,
)
from gnws_d2.layers.weight_standardization import standardize_weight_reference
from gnws_d2.utils.errors import exit_on_user_error
from gnws_d2.utils.process import keep_freed_memory

Step = Callable[[], Any]


class Part(NamedTuple):
    """One thing to measure."""

    prepare: Callable[[], Step]  # returns the step to time
    calls: int = 1  # per step; times are divided by it
    memory: bool = False  # whether to measure peak memory


Parts = dict[str, Part]


def make_inputs(cfg: CfgNode, size: list[int], batch_size: int) -> list[dict[str, Any]]:
    """Return seeded images with eight objects each, in Detectron2's model input format."""
    torch.manual_seed(0)
    inputs = []
    for _ in range(batch_size):
        corners = torch.rand(8, 2) * 0.6
        corners = torch.cat([corners, corners + 0.1 + torch.rand(8, 2) * 0.3], dim=1)
        boxes = corners * torch.tensor([*size[::-1]] * 2)
        masks = torch.zeros(8, *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            mask[y0:y1, x0:x1] = True
        instances = Instances(tuple(size), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.arange(8) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def build_variant(cfg: CfgNode, name: str, train: bool, inputs: list[dict[str, Any]]) -> nn.Module:
    """Build a model with random weights. All but FrozenBN give the same outputs."""
    cfg = cfg.clone()
    cfg.defrost()
    if name.startswith("GN+WS, "):
        cfg.MODEL.GNWS.KERNELS = name.removeprefix("GN+WS, ")
    if name == "FrozenBN":
        heads = [cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD]
        for node in (cfg.MODEL.BACKBONE, *heads):
            node.NAME = STOCK_NAMES[node.NAME]
        for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, *heads):
            node.NORM = "BN"
    torch.manual_seed(0)
    model: Any = build_model(cfg)
    # As many detections as a trained model has; else the mask head would have nothing to do.
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    for m in model.modules():
        if isinstance(m, WSConv2d) and train:
            m.channels_last = False  # only inference uses it
        elif isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0  # use the statistics of one batch; without any, activations explode
    if name == "FrozenBN":
        with torch.no_grad(), EventStorage():
            model(inputs)
        model = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    elif name == "GN, Detectron2":
        model, _ = fold_model(model, cfg)
    elif name == "GN" or (not train and name != "GN+WS, reference"):
        fold_for_inference(model)
    return model.train(train)


def prepare_model(
    cfg: CfgNode, variant: str, train: bool, size: list[int], batch_size: int
) -> Step:
    """Return a training step, or the inference of a batch."""
    inputs = make_inputs(cfg, size, batch_size)
    model = build_variant(cfg, variant.removesuffix(", AMP"), train, inputs)
    amp, device = variant.endswith(", AMP"), torch.device(cfg.MODEL.DEVICE).type
    dtype = torch.bfloat16 if device == "cpu" else getattr(torch, cfg.SOLVER.AMP.PRECISION)
    autocast = torch.autocast(device, dtype, enabled=amp)
    scaler = torch.amp.GradScaler(device, enabled=amp and dtype == torch.float16)
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that every step does the same work

    @torch.no_grad()
    def infer() -> None:
        with autocast:
            model(inputs)

    def train_step() -> None:
        torch.manual_seed(0)  # sample the same proposals
        with EventStorage(), autocast:
            loss = sum(model(inputs).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train_step if train else infer


def standardize(dtype: torch.dtype, kernels: str, weight: Tensor) -> Tensor:
    if kernels == "reference":
        return standardize_weight_reference(weight).to(dtype)
    return standardize_weight(weight, dtype=dtype, kernels=kernels)


def normalize(kernels: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if kernels == "reference":
        return F.relu_(F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype)))
    return group_norm(x, 32, weight, bias, relu=True, kernels=kernels)


def run_operator(
    operator: Callable[..., Tensor], inputs: Any, grads: list[Tensor], calls: int, backward: bool
) -> None:
    """Call `operator` with each of `inputs`, `calls` times."""
    for _ in range(calls):
        with torch.set_grad_enabled(backward):
            outputs = [operator(*tensors) for tensors in inputs]
        if backward:
            torch.autograd.grad(outputs, [t for tensors in inputs for t in tensors], grads)


def prepare_ops(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    """Weight standardization of all convolutions of a model, and GroupNorm + ReLU by shape."""
    kernels = variant.removeprefix("GN+WS").removeprefix(", ") or "auto"
    cuda = cfg.MODEL.DEVICE != "cpu"
    batch_sizes = (1, 2) if args.work == "gpu" else (args.batch_size,)
    shapes = [shape for n in batch_sizes for shape in model_shapes(n, *args.image_size)]
    model = build_model(cfg).requires_grad_()  # the frozen layers too
    weights = [(m.weight,) for m in model.modules() if isinstance(m, WSConv2d)]
    parts = {}
    for dtype in [torch.float32] + [getattr(torch, cfg.SOLVER.AMP.PRECISION)] * cuda:
        cases: dict[str, Any] = {}
        cases["weight standardization"] = partial(standardize, dtype, kernels), weights
        for shape in shapes:
            tensors = torch.randn(shape, dtype=dtype), *torch.randn(2, shape[1])
            inputs = [tuple(t.to(cfg.MODEL.DEVICE).requires_grad_() for t in tensors)]
            name = f"GroupNorm + ReLU, {' x '.join(map(str, shape))}"
            cases[name] = partial(normalize, kernels), inputs
        for backward, (name, (operator, inputs)) in product((False, True), cases.items()):
            grads = [tensors[0].detach().to(dtype) for tensors in inputs]
            calls = 50 if cuda else 1
            # A partial of partial, as Part.prepare returns the step.
            prepare = partial(partial, run_operator, operator, inputs, grads, calls, backward)
            name += f", {str(dtype).removeprefix('torch.')}{'' if backward else ', forward'}"
            parts[name] = Part(prepare, calls)
    return parts


def prepare_models(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    train = args.work == "train"
    prepare = partial(prepare_model, cfg, variant, train, args.image_size, args.batch_size)
    return {args.work: Part(prepare, memory=True)}


def model_shapes(n: int, height: int, width: int) -> list[tuple[int, ...]]:
    """Return the shapes that Mask R-CNN's GroupNorms get for `n` images, padded by Detectron2."""
    height, width = (-(-size // 32) * 32 for size in (height, width))
    channels = {2: [64], 4: [64, 256, 128], 8: [128, 512, 256], 16: [256, 1024, 512]}
    channels[32] = [512, 2048, 256]
    shapes = [(n, c, height // s, width // s) for s, cs in channels.items() for c in cs]
    return [*shapes, (1000 * n, 256, 7, 7), (100 * n, 256, 14, 14)]  # box head, mask head


def prepare_gpu(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    """Models, and for GN+WS also the operators."""
    parts = prepare_ops(cfg, variant, args) if variant.startswith("GN+WS") else {}
    for work, n in [("inference", 1), ("train", 2), ("inference", 8), ("train", 8)]:
        for name in (variant, f"{variant}, AMP"):
            prepare = partial(prepare_model, cfg, name, work == "train", args.image_size, n)
            parts[f"{work}, batch {n}{name.removeprefix(variant)}"] = Part(prepare, memory=True)
    return parts


def prepare_dataloader(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    """Map the images of the first dataset of ``DATASETS.TRAIN`` in one thread."""
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    np.random.seed(0)  # both mappers draw the same augmentation
    mapper_class = DatasetMapper if variant == "DatasetMapper" else OpenCVDatasetMapper

    def prepare(is_train: bool) -> Step:
        mapper = mapper_class(cfg, is_train)
        return lambda: deque(map(mapper, records), maxlen=0)

    names = {f"{len(records)} images, training": True, f"{len(records)} images, test": False}
    return {name: Part(partial(prepare, is_train)) for name, is_train in names.items()}


def measure_part(part: Part, args: argparse.Namespace, cuda: bool) -> tuple[list[float], int]:
    """Return the seconds of each run, and the peak memory in bytes beyond what was in use."""
    gc.collect()
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = _peak_memory(cuda)
    step, seconds = part.prepare(), []
    for _ in range(3 if cuda else 1):
        step()  # to warm up
    for _ in range(args.runs):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append((time.perf_counter() - start) / part.calls)
    return seconds, _peak_memory(cuda) - before


def _peak_memory(cuda: bool) -> int:
    """Return the peak in bytes: on the GPU since the last reset, or of the process so far."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated() if cuda else resident


@exit_on_user_error
def main() -> None:
    """Measure a variant; print ``machine``, ``seconds`` and ``memory_bytes`` by part, as JSON."""
    variant, args = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    output, sys.stdout = sys.stdout, sys.stderr  # for what others print
    sys.argv = ["benchmark.py"]  # for errors
    cfg = load_config(args.config_file, args.opts, args.dataset)
    register_coco_datasets(cfg.DATASETS.COCO)
    cuda = cfg.MODEL.DEVICE != "cpu" and args.work != "dataloader"
    if cuda:
        check_device(cfg)
    elif args.work == "ops" or variant.removesuffix(", AMP") in ("GN+WS", "GN"):
        # As Predictor and train_net.py do for these models. For operators, in both variants.
        keep_freed_memory()
    result: dict[str, Any] = {"machine": describe_machine(), "seconds": {}, "memory_bytes": {}}
    prepare = {"ops": prepare_ops, "dataloader": prepare_dataloader, "gpu": prepare_gpu}
    for name, part in prepare.get(args.work, prepare_models)(cfg, variant, args).items():
        result["seconds"][name], memory = measure_part(part, args, cuda)
        if part.memory:
            result["memory_bytes"][name] = [memory]
    print(json.dumps(result), file=output, flush=True)


if __name__ == "__main__":
    main()
