#!/usr/bin/env python3
"""
Measure GN+WS beside plain GN, frozen BatchNorm and the reference formula, in turns in one process.

ops: weight standardization and GroupNorm + ReLU alone. inference, train: whole models, in float32
and mixed precision. dataloader: the mappers. Writes a table in Markdown, JSON and a bar chart.
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from gnws_d2 import model_zoo
from gnws_d2.data import register_coco_datasets
from gnws_d2.engine import add_dataset_argument, benchmark, load_config
from gnws_d2.engine.checks import check_device
from gnws_d2.utils.errors import UserError, exit_on_user_error
from gnws_d2.utils.files import replace_file
from gnws_d2.utils.visualizer import plot_bars

Report = tuple[list[tuple[str, list[str], list[list[Any]]]], dict[str, Any], dict[str, list[float]]]
GB = 2**30


def spread(variant: benchmark.Variant, scale: float) -> str:
    return f"{min(variant.seconds) * scale:.3g} - {max(variant.seconds) * scale:.3g}"


def models(cfg: Any, args: argparse.Namespace) -> Report:
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
            [v.name, memory and f"{memory / GB:.2f}", f"{v.median / batch_size:.4g}"]
            + [spread(v, 1 / batch_size), reference and f"{reference.median / v.median:.2f}x"]
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


def ops(cfg: Any, args: argparse.Namespace) -> Report:
    runs = max(args.runs, 3)
    tables: list[tuple[str, list[str], list[list[Any]]]] = []
    bars: dict[str, list[float]] = {}
    ratios, records = {}, {}
    both, forward = benchmark.benchmark_weight_standardization(cfg, args.turns, runs)
    rows = []
    for work, variants in (("forward and backward", both), ("forward", forward)):
        ours, formula = variants
        ratio = formula.median / ours.median
        ratios[f"weight standardization, {work}: formula / ours, time"] = ratio
        rows.append([work, f"{formula.median * 1e3:.3g}", spread(formula, 1e3)])
        rows[-1] += [f"{ours.median * 1e3:.3g}", spread(ours, 1e3), f"{ratio:.2f}x"]
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


def dataloader(cfg: Any, args: argparse.Namespace) -> Report:
    (dataset, *_) = cfg.DATASETS.TRAIN
    measured = benchmark.benchmark_mapper(cfg, dataset, args.turns)
    rows, ratios, bars = [], {}, {}
    for split, (ours, detectron2) in measured.items():
        ratios[f"{split}: DatasetMapper / OpenCVDatasetMapper, time"] = (
            detectron2.median / ours.median
        )
        for v in (detectron2, ours):
            rows.append([split, v.name, f"{1 / v.median:.1f}", spread(v, 1e3)])
            bars[f"{v.name}, {split}"] = v.seconds
    header = ["", "mapper", "images / s / core", "ms, min - max"]
    records = {split: [v.record() for v in variants] for split, variants in measured.items()}
    return [(f"Images of {dataset}", header, rows)], {**records, "ratios": ratios}, bars


WORK: dict[str, Callable[..., Report]] = {
    "ops": ops,
    "inference": models,
    "train": models,
    "dataloader": dataloader,
}


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=list(WORK))
    parser.add_argument(
        "--config-file", default=model_zoo.get_config_file("mask_rcnn_R50_gnws_2x"), metavar="FILE"
    )
    variants = [*benchmark.MODELS, *(f"{model}, AMP" for model in benchmark.MODELS)]
    parser.add_argument(
        "--models", nargs="+", default=variants, choices=variants, metavar="NAME",
        help=f"of inference and train, from {'; '.join(variants)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, help="default: 1 for inference, 2 for training")
    parser.add_argument("--turns", type=int, default=3, help="of each variant (default: 3)")
    parser.add_argument("--runs", type=int, default=1, help="timed in a turn (default: 1)")
    parser.add_argument("--output", default="output/benchmark", metavar="DIR")
    add_dataset_argument(parser)
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="as MODEL.DEVICE cpu"
    )
    args = parser.parse_args()
    if min(args.turns, args.runs, *args.image_size) < 1 or (args.batch_size or 1) < 1:
        raise UserError("--turns, --runs, --image-size and --batch-size are at least 1.")
    setup_logger()
    register_coco_datasets(args.dataset)
    cfg = load_config(args.config_file, args.opts)
    if args.work != "dataloader":
        check_device(cfg)

    tables, record, bars = WORK[args.work](cfg, args)
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


if __name__ == "__main__":
    main()
