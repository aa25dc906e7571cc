#!/usr/bin/env python3
"""
Compare the speed and memory of GN+WS with GN, frozen BatchNorm and the published formula.

ops: weight standardization and GroupNorm + ReLU, forward and backward. inference, train: whole
models in float32. dataloader: the dataset mappers. gpu: operators and models, in float32 and mixed
precision, with MODEL.GNWS.KERNELS "auto" and "torch".

Each variant runs in its own process, and variants take turns. Prints a Markdown table with the
ratios to the first variant, and writes all times to a JSON file.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import cli  # before Detectron2, whose warnings it filters

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
from tabulate import tabulate
from torch import nn

from benchmark_ops import Parts, Step, prepare_ops
from gnws_d2.config import check_device, load_config
from gnws_d2.data import OpenCVDatasetMapper, register_coco_datasets
from gnws_d2.engine.run_record import describe_machine
from gnws_d2.export.formats import STOCK_NAMES
from gnws_d2.layers import WSConv2d, fold_for_inference
from gnws_d2.utils.errors import exit_on_user_error
from gnws_d2.utils.process import keep_freed_memory

MODELS = ["GN+WS", "GN", "FrozenBN"]
VARIANTS = {
    "ops": ["GN+WS", "GN+WS, reference"],
    "dataloader": ["OpenCVDatasetMapper", "DatasetMapper"],
    "gpu": ["GN+WS", "GN+WS, torch", "GN", "FrozenBN"],
}
CALLS_ON_GPU = 50  # of an operator in a run
# By variant: "machine"; "seconds" and "memory_bytes" of each run, by part.
Measured = dict[str, dict[str, Any]]


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
    """Build a model with random weights. GN+WS and GN give the same outputs."""
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
    elif name == "GN" or not train:
        fold_for_inference(model)
    return model.train(train)


def prepare_model(
    cfg: CfgNode, variant: str, train: bool, size: list[int], batch_size: int, amp: bool
) -> Step:
    """Return a training step, or the inference of a batch."""
    inputs = make_inputs(cfg, size, batch_size)
    model = build_variant(cfg, variant, train, inputs)
    device = torch.device(cfg.MODEL.DEVICE).type
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


def prepare_models(cfg: CfgNode, variant: str, args: argparse.Namespace) -> Parts:
    """Models; on a GPU with several batch sizes, and for GN+WS with the operators before them."""
    on_gpu = args.work == "gpu"
    works = [("inference", 1), ("train", 2), ("inference", 8), ("train", 8)]
    parts = prepare_ops(cfg, variant, args) if on_gpu and variant.startswith("GN+WS") else {}
    for work, n in works if on_gpu else [(args.work, args.batch_size)]:
        for amp in (False, True) if on_gpu else (False,):
            parts[f"{work}, batch {n}{', AMP' if amp else ''}"] = partial(
                prepare_model, cfg, variant, work == "train", args.image_size, n, amp
            )
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

    names = {"training": True, "test": False}
    return {f"{len(records)} images, {k}": partial(prepare, v) for k, v in names.items()}


def measure_part(
    prepare: Callable[[], Step], num_runs: int, calls: int, cuda: bool
) -> tuple[list[float], int]:
    """Return the seconds of each run, and the peak memory in bytes beyond what was in use."""
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = _peak_memory(cuda)
    step, seconds = prepare(), []
    warm_up = 3 if cuda else 1
    for run in range(warm_up + num_runs):
        start = time.perf_counter()
        for _ in range(calls if run >= warm_up else 1):
            step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return seconds[warm_up:], _peak_memory(cuda) - before


def _peak_memory(cuda: bool) -> int:
    """Return the peak in bytes: on the GPU since the last reset, or of the process so far."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated() if cuda else resident


def measure_variant(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a variant, in a process of its own."""
    cfg = load_config(args.config_file, args.opts, args.dataset)
    register_coco_datasets(cfg.DATASETS.COCO)
    cuda = cfg.MODEL.DEVICE != "cpu" and args.work != "dataloader"
    if cuda:
        check_device(cfg)
    elif args.work == "ops" or variant in ("GN+WS", "GN"):
        # As Predictor and train_net.py do for these models. For operators, in both variants.
        keep_freed_memory()
    prepare = {"ops": prepare_ops, "dataloader": prepare_dataloader}.get(args.work, prepare_models)
    result: dict[str, Any] = {"machine": describe_machine(), "seconds": {}, "memory_bytes": {}}
    for name, part in prepare(cfg, variant, args).items():
        is_model = "batch" in name
        calls = CALLS_ON_GPU if cuda and not is_model else 1
        result["seconds"][name], memory = measure_part(part, args.runs, calls, cuda)
        if is_model:
            result["memory_bytes"][name] = [memory]
    return result


def measure(variants: list[str], args: argparse.Namespace) -> Measured:
    """Measure each variant ``args.turns`` times, in turns."""
    measured: Measured = {}
    for turn in range(args.turns):
        # A B B A: a machine that slows down affects all variants alike.
        for variant in variants[:: -1 if turn % 2 else 1]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result = process.submit(measure_variant, variant, args).result()
            for key in ("seconds", "memory_bytes"):
                for part, values in measured.setdefault(variant, result)[key].items():
                    values += result[key][part] if turn else []
    return measured


def format_table(measured: Measured) -> str:
    """
    Return a Markdown table of medians, with the range in brackets and the ratio to the first
    variant: times in ms, and the peak memory over that before the model was built in GiB.
    """
    of_first = next(iter(measured.values()))
    table = [["", *measured]]
    for key, unit, size in (("seconds", "ms", 1e-3), ("memory_bytes", "GiB", 2**30)):
        for part, base in of_first[key].items():
            table.append([f"{part}, {unit}"])
            for m in measured.values():
                cell = ""
                if part in m[key]:  # operators are measured for GN+WS only
                    values = [value / size for value in m[key][part]]
                    median = statistics.median(values)
                    ratio = median / (statistics.median(base) / size or 1)
                    cell = f"{median:.4g} ({min(values):.4g} - {max(values):.4g}) {ratio:.3f}x"
                table[-1].append(cell)
    return tabulate(table, "firstrow", "github", disable_numparse=True)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, text = parser.add_argument, f"for inference and train (default: {' '.join(MODELS)})"
    add("work", choices=["ops", "inference", "train", "dataloader", "gpu"])
    add("--config-file", default="mask_rcnn_R50_gnws_2x", metavar="FILE")
    add("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=text)
    add("--image-size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"))
    add("--batch-size", type=int, help="default: 1, or 2 for train; gpu has its own")
    add("--turns", type=int, default=3, help="turns of each variant (default: 3)")
    add("--runs", type=int, help="timed runs in each turn (default: 1, or 5 for gpu)")
    add("--output", default="output/benchmark", metavar="DIR")
    cli.add_dataset_argument(parser)
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="such as MODEL.DEVICE cpu")
    return parser


@exit_on_user_error()
def main() -> None:
    args = argument_parser().parse_args()
    args.batch_size = args.batch_size or (2 if args.work == "train" else 1)
    args.runs = args.runs or (5 if args.work == "gpu" else 1)
    measured = measure(VARIANTS.get(args.work, args.models), args)
    print(f"### {shlex.join(['benchmark.py', *sys.argv[1:]])}\n\n{format_table(measured)}")
    os.makedirs(args.output, exist_ok=True)
    with open(os.path.join(args.output, f"{args.work}.json"), "w") as f:
        json.dump({**vars(args), "variants": measured}, f, indent=1)


if __name__ == "__main__":
    main()
