#!/usr/bin/env python3
"""
Compare the speed and memory of GN+WS with GN, frozen BatchNorm and the reference formula.

ops: weight standardization and GroupNorm + ReLU, forward and backward. inference, train: whole
models, in float32 or mixed precision. dataloader: the dataset mappers. gpu: operators and models,
in float32 and mixed precision, with MODEL.GNWS.KERNELS "auto", "torch" and "triton".

Each variant runs in its own process, and variants take turns. Prints a Markdown table with the
ratios to the first variant, and writes all times to a JSON file.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from typing import Any

from tabulate import tabulate

from cli import add_dataset_argument

MODELS = ["GN+WS", "GN", "GN+WS, reference", "GN, Detectron2", "FrozenBN"]
ALL_MODELS = [*MODELS, *(f"{name}, AMP" for name in MODELS)]
VARIANTS = {
    "ops": ["GN+WS", "GN+WS, reference"],
    "dataloader": ["OpenCVDatasetMapper", "DatasetMapper"],
    "gpu": ["GN+WS", "GN+WS, torch", "GN+WS, triton", "GN", "FrozenBN"],
}
# By variant: "machine"; "seconds" and "memory_bytes" of each run, by part.
Measured = dict[str, dict[str, Any]]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", choices=["ops", "inference", "train", "dataloader", "gpu"])
    add("--config-file", default="mask_rcnn_R50_gnws_2x", metavar="FILE")
    names = (
        f"for inference and train: {'; '.join(MODELS)}; or these with ', AMP' (default: without)"
    )
    add("--models", nargs="+", choices=ALL_MODELS, default=MODELS, metavar="NAME", help=names)
    add("--image-size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"))
    add("--batch-size", type=int, help="default: 1, or 2 for train; gpu has its own")
    add("--turns", type=int, default=3, help="turns of each variant (default: 3)")
    add("--runs", type=int, help="timed runs in each turn (default: 1, or 5 for gpu)")
    add("--output", default="output/benchmark", metavar="DIR")
    add_dataset_argument(parser)
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="such as MODEL.DEVICE cpu")
    return parser


def measure_variant(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure `variant` in a new process, and return the JSON that it prints."""
    script = os.path.join(os.path.dirname(__file__), "benchmark_variants.py")
    command = [sys.executable, script, variant, json.dumps(vars(args))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode > 0:  # it has printed why
        sys.exit(process.returncode)
    if process.returncode < 0:
        sys.exit(f"benchmark.py: error: {variant} was killed ({process.returncode}).")
    return json.loads(process.stdout)


def measure(variants: list[str], args: argparse.Namespace) -> Measured:
    """Measure each variant ``args.turns`` times, in turns."""
    measured: Measured = {}
    for turn in range(args.turns):
        # A B B A: a machine that slows down affects all variants alike.
        for variant in variants[:: -1 if turn % 2 else 1]:
            result = measure_variant(variant, args)
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
            row = [f"{part}, {unit}"]
            for m in measured.values():
                values = m[key].get(part, [])  # operators are measured for GN+WS only
                low, median, high = (
                    f(values) / size if values else 0.0 for f in (min, statistics.median, max)
                )
                ratio = median * size / (statistics.median(base) or 1)
                row.append(f"{median:.4g} ({low:.4g} - {high:.4g}) {ratio:.3f}x" if values else "")
            table.append(row)
    return tabulate(table, "firstrow", "github", disable_numparse=True)


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = 2 if args.work == "train" else 1
    if args.runs is None:
        args.runs = 5 if args.work == "gpu" else 1
    measured = measure(VARIANTS.get(args.work, args.models), args)
    print(f"### {shlex.join(['benchmark.py', *sys.argv[1:]])}\n\n{format_table(measured)}")
    os.makedirs(args.output, exist_ok=True)
    with open(os.path.join(args.output, f"{args.work}.json"), "w") as f:
        json.dump({**vars(args), "variants": measured}, f, indent=1)


if __name__ == "__main__":
    main()
