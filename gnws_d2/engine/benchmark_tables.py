"""Tables, ratios and charts of what :mod:`gnws_d2.engine.benchmark` measures."""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from .. import model_zoo
from ..data import register_coco_datasets
from ..utils.errors import UserError
from ..utils.files import replace_file
from ..utils.visualizer import plot_bars
from . import benchmark
from .checks import check_device
from .defaults import load_config

# Tables of a title, a header and rows; what goes into the JSON; seconds of each bar of the chart.
_Table = tuple[str, list[str], list[list[Any]]]
_Report = tuple[list[_Table], dict[str, Any], dict[str, list[float]]]
_GB = 2**30


def _spread(variant: benchmark.Variant, scale: float) -> str:
    return f"{min(variant.seconds) * scale:.3g} - {max(variant.seconds) * scale:.3g}"


def _models(cfg: Any, args: argparse.Namespace) -> _Report:
    train = args.work == "train"
    batch_size = args.batch_size or (2 if train else 1)
    variants = benchmark.benchmark_models(
        cfg, train, tuple(args.image_size), batch_size, args.turns, args.runs, args.models
    )
    by_name = {v.name: v for v in variants}
    reference = by_name.get("GN+WS, reference")
    rows = []
    for v in variants:
        memory = v.record()["memory_bytes"]
        rows.append(
            [v.name, memory and f"{memory / _GB:.2f}", f"{v.median / batch_size:.4g}"]
            + [_spread(v, 1 / batch_size), reference and f"{reference.median / v.median:.2f}x"]
        )
    name = os.path.basename(args.config_file).removesuffix(".yaml")
    for row in model_zoo.table():
        if row["name"] == name:
            memory, seconds = row["train_memory_gb"], row["inference_s_per_im_v100"]
            published = ["MMDetection's published (V100)", memory if train else ""]
            rows.append([*published, "" if train else seconds, "", ""])
    time = "Train time (s/im)" if train else "Inf time (s/im)"
    header = ["", "Mem (GB)", time, "min - max", "speed to the reference"]
    h, w = args.image_size
    title = f"{'Training step' if train else 'Inference'} of {name}, {batch_size} x {h} x {w}"
    ratios = {}
    for a, b in (
        ("GN+WS", "GN"),
        ("GN+WS", "FrozenBN"),
        ("GN+WS, reference", "GN+WS"),
        ("GN+WS, reference", "GN+WS, AMP"),
    ):
        if a in by_name and b in by_name:
            ratios[f"{a} / {b}, time"] = by_name[a].median / by_name[b].median
            memories = [by_name[name].record()["memory_bytes"] for name in (a, b)]
            if all(memories):
                ratios[f"{a} / {b}, memory"] = memories[0] / memories[1]
    bars = {v.name: [s / batch_size for s in v.seconds] for v in variants}
    records = {"batch_size": batch_size, "variants": [v.record() for v in variants]}
    return [(title, header, rows)], {**records, "ratios": ratios}, bars


def _ops(cfg: Any, args: argparse.Namespace) -> _Report:
    runs = max(args.runs, 3)
    tables: list[_Table] = []
    bars: dict[str, list[float]] = {}
    ratios, records = {}, {}
    both, forward = benchmark.benchmark_weight_standardization(cfg, args.turns, runs)
    rows = []
    for work, variants in (("forward and backward", both), ("forward", forward)):
        ours, formula = variants
        ratio = formula.median / ours.median
        ratios[f"weight standardization, {work}: formula / ours, time"] = ratio
        rows.append([work, f"{formula.median * 1e3:.3g}", _spread(formula, 1e3)])
        rows[-1] += [f"{ours.median * 1e3:.3g}", _spread(ours, 1e3), f"{ratio:.2f}x"]
        records[work] = [v.record() for v in variants]
        bars |= {f"{v.name}, {work}": v.seconds for v in variants}
    header = ["", "formula (ms)", "min - max", "ours (ms)", "min - max", "speed"]
    title = "Weight standardization of all convolutions"
    tables.append((title, header, rows))

    rows = []
    for row in benchmark.benchmark_group_norm(cfg, tuple(args.image_size), args.turns, runs):
        ours, pytorch = row["ours"], row["pytorch"]
        rows.append(
            ["x".join(map(str, row["shape"])), row["dtype"], "+" if row["residual"] else ""]
        )
        rows[-1] += [f"{pytorch.median * 1e3:.3g}", f"{ours.median * 1e3:.3g}"]
        rows[-1] += [f"{pytorch.median / ours.median:.2f}x", f"{row['copy_s'] / ours.median:.0%}"]
        records.setdefault("group_norm", []).append(
            {**row, "ours": ours.record(), "pytorch": pytorch.record()}
        )
    header = ["x", "dtype", "residual", "PyTorch (ms)", "ours (ms)", "speed", "copy bandwidth"]
    tables.append(("GroupNorm + ReLU, forward and backward", header, rows))
    return tables, {**records, "ratios": ratios}, bars


def _dataloader(cfg: Any, args: argparse.Namespace) -> _Report:
    (dataset, *_) = cfg.DATASETS.TRAIN
    measured = benchmark.benchmark_mapper(cfg, dataset, args.turns)
    rows, ratios, bars = [], {}, {}
    for split, (ours, detectron2) in measured.items():
        ratios[f"{split}: DatasetMapper / OpenCVDatasetMapper, time"] = (
            detectron2.median / ours.median
        )
        for v in (detectron2, ours):
            rows.append([split, v.name, f"{1 / v.median:.1f}", _spread(v, 1e3)])
            bars[f"{v.name}, {split}"] = v.seconds
    header = ["", "mapper", "images / s / core", "ms, min - max"]
    records = {split: [v.record() for v in variants] for split, variants in measured.items()}
    return [(f"Images of {dataset}", header, rows)], {**records, "ratios": ratios}, bars


_WORK: dict[str, Callable[..., _Report]] = {
    "ops": _ops,
    "inference": _models,
    "train": _models,
    "dataloader": _dataloader,
}


def run_benchmark(args: argparse.Namespace) -> None:
    """
    Measure, print the tables and ratios, and write them as Markdown, JSON and a chart.

    Args:
        args: of ``tools/benchmark.py``.

    Raises:
        UserError: for an argument, a config or a dataset that cannot be.
    """
    if min(args.turns, args.runs, *args.image_size) < 1 or (args.batch_size or 1) < 1:
        raise UserError("--turns, --runs, --image-size and --batch-size are at least 1.")
    variants = [*benchmark.MODELS, *(f"{model}, AMP" for model in benchmark.MODELS)]
    if unknown := set(args.models or ()) - set(variants):
        raise UserError(f"--models {'; '.join(unknown)}: the models are {'; '.join(variants)}.")
    args.models = args.models or variants
    setup_logger()
    register_coco_datasets(args.dataset)
    cfg = load_config(args.config_file, args.opts)
    if args.work != "dataloader":
        check_device(cfg)

    tables, record, bars = _WORK[args.work](cfg, args)
    device = "cpu" if args.work == "dataloader" else cfg.MODEL.DEVICE
    machine = benchmark.describe_machine(torch.device(device))
    text = ""
    for title, header, rows in tables:
        text += f"### {title}\n\n{tabulate(rows, header, 'github', disable_numparse=True)}\n\n"
    text += "".join(f"- {name}: {ratio:.3f}\n" for name, ratio in record["ratios"].items())
    text += "\n" + ", ".join(f"{key} {value}" for key, value in machine.items()) + "\n"
    os.makedirs(args.output, exist_ok=True)
    path = os.path.join(args.output, args.work)
    record |= {"machine": machine, "config": args.config_file, "opts": args.opts}
    for suffix, content in ((".md", text), (".json", json.dumps(record, indent=1, default=str))):
        with replace_file(f"{path}{suffix}") as f:
            f.write(content)
    plot_bars(bars, tables[0][0], f"{path}.png")
    print(text)
