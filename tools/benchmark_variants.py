"""What a process of ``tools/benchmark.py`` measures: one variant."""

import argparse
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import gnws_tools  # noqa: F401  (before Detectron2, whose warnings it filters)

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

from gnws_d2.config import load_config
from gnws_d2.data import OpenCVDatasetMapper, register_coco_datasets
from gnws_d2.data.coco import check_registered
from gnws_d2.engine.checks import check_device, check_precision
from gnws_d2.engine.run_record import describe_machine
from gnws_d2.export.fold import STOCK_NAMES
from gnws_d2.layers import (
    WSConv2d,
    fold_for_inference,
    fold_ws_conv,
    group_norm,
    standardize_weight,
)
from gnws_d2.layers.weight_standardization import standardize_weight_reference
from gnws_d2.utils.errors import UserError, exit_on_user_error
from gnws_d2.utils.process import keep_freed_memory

# What is timed, by name.
Parts = dict[str, Callable[[], Any]]


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
    if name == "GN+WS, reference":
        cfg.MODEL.GNWS.KERNELS = "reference"
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
        fold_ws_conv(model)
    elif name == "GN" or (name == "GN+WS" and not train):
        fold_for_inference(model)
    return model.train(train)


def prepare_model(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    train = args.work == "train"
    inputs = make_inputs(cfg, args.image_size, args.batch_size)
    model = build_variant(cfg, variant.removesuffix(", AMP"), train, inputs)
    amp, device = variant.endswith(", AMP"), torch.device(cfg.MODEL.DEVICE).type
    dtype = torch.bfloat16 if device == "cpu" else getattr(torch, cfg.SOLVER.AMP.PRECISION)
    autocast = torch.autocast(device, dtype, enabled=amp)
    scaler = torch.amp.GradScaler(device, enabled=amp and dtype == torch.float16)
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # every step is to have the same work

    @torch.no_grad()
    def infer() -> None:
        with autocast:
            model(inputs)

    def train_step() -> None:
        torch.manual_seed(0)  # of the proposals that are sampled
        with EventStorage(), autocast:
            loss = sum(model(inputs).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return {args.work: train_step if train else infer}


def prepare_ops(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    """Forward and backward of weight standardization, and of GroupNorm + ReLU at shapes of R-50."""
    fused = variant == "fused"
    model = build_model(cfg).requires_grad_()  # the frozen layers too
    weights = [m.weight for m in model.modules() if isinstance(m, WSConv2d)]
    standardize = standardize_weight if fused else standardize_weight_reference

    def standardize_all() -> None:
        torch.autograd.grad([standardize(w) for w in weights], weights, weights)

    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> None:
        if fused:
            y = group_norm(x, 32, weight, bias, relu=True)
        else:
            y = F.relu_(F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype)))
        torch.autograd.grad(y, [x, weight, bias], x)

    parts: Parts = {"weight standardization": standardize_all}
    n, (h, w) = args.batch_size, args.image_size
    stages = [(n, 256 * s // 4, h // s, w // s) for s in (4, 8, 16, 32)]
    for shape in [(n, 64, h // 2, w // 2), *stages, (1000 * n, 256, 7, 7)]:
        for dtype in [torch.float32] + [torch.float16] * torch.cuda.is_available():
            leaves = [torch.randn(shape, dtype=dtype), *torch.randn(2, shape[1])]
            leaves = [leaf.to(cfg.MODEL.DEVICE).requires_grad_() for leaf in leaves]
            parts[f"GroupNorm + ReLU, {shape}, {dtype}"] = partial(normalize, *leaves)
    return parts


def prepare_mapper(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    """Map the images of the first dataset of ``DATASETS.TRAIN`` in one thread."""
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name the dataset to map.")
    check_registered("TRAIN", cfg.DATASETS.TRAIN[0])
    try:
        records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    except OSError as e:
        raise UserError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]} cannot be read: {e}.") from e
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    np.random.seed(0)  # both mappers draw the same augmentation
    mapper_class = DatasetMapper if variant == "DatasetMapper" else OpenCVDatasetMapper
    train, test = mapper_class(cfg, True), mapper_class(cfg, False)
    return {
        f"{len(records)} images, training": lambda: deque(map(train, records), maxlen=0),
        f"{len(records)} images, test": lambda: deque(map(test, records), maxlen=0),
    }


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_memory(cuda: bool) -> int:
    """Return the bytes at the peak of this process: allocated on the GPU, or resident."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@exit_on_user_error
def main() -> None:
    """
    Measure a variant, and write its ``seconds`` by part, ``memory_bytes`` and ``machine`` as JSON.

    Raises:
        UserError: for a config, a device or a dataset that cannot be used.
    """
    variant, args = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    results, sys.stdout = sys.stdout, sys.stderr  # for what others print
    sys.argv = ["benchmark.py"]  # for errors
    cfg = load_config(args.config_file, args.opts, args.dataset)
    register_coco_datasets(cfg.DATASETS.COCO)
    cuda = cfg.MODEL.DEVICE != "cpu" and args.work != "dataloader"
    if variant.endswith(", AMP"):
        check_precision(cfg.MODEL.DEVICE, cfg.SOLVER.AMP.PRECISION if cuda else "bfloat16")
    if cuda:
        check_device(cfg)
    elif args.work == "ops" or variant.removesuffix(", AMP") in ("GN+WS", "GN"):
        # As entry points do for our models; all operations are compared with the same setting.
        keep_freed_memory()
    before = _peak_memory(cuda)
    prepare = {"ops": prepare_ops, "dataloader": prepare_mapper}.get(args.work, prepare_model)
    seconds = {}
    for part, run in prepare(cfg, variant, args).items():
        _time(run)  # to warm up
        seconds[part] = [_time(run) for _ in range(args.runs)]
    memory = _peak_memory(cuda) - before
    result = {"seconds": seconds, "memory_bytes": memory, "machine": describe_machine()}
    print(json.dumps(result), file=results)


if __name__ == "__main__":
    main()
