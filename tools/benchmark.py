#!/usr/bin/env python3
"""
Measure the speed and memory of GN+WS beside GN, frozen BatchNorm and the reference formula.

ops: weight standardization and GroupNorm + ReLU, forward and backward. inference, train: whole
models, in float32 or mixed precision. dataloader: the dataset mappers. gpu: operators and models on
a GPU, in float32 and mixed precision, with MODEL.GNWS.KERNELS "auto", "torch" and "triton".

Each variant runs in its own process, and variants take turns. Writes a Markdown table with the
ratios to the first variant and a JSON file with all times.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from typing import Any

from tabulate import tabulate

from cli import add_dataset_argument

MODELS = ["GN+WS", "GN", "GN+WS, reference", "GN, Detectron2", "FrozenBN"]
ALL_MODELS = [*MODELS, *(f"{name}, AMP" for name in MODELS)]
VARIANTS = {
    "ops": ["fused", "PyTorch"],
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
    add("--dry-run", action="store_true", help="gpu: a tiny model on the CPU, to test the command")
    add_dataset_argument(parser)
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="such as MODEL.DEVICE cpu")
    return parser


def measure_variant(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a new process; return what it prints."""
    script = os.path.join(os.path.dirname(__file__), "benchmark_variants.py")
    command = [sys.executable, script, variant, json.dumps(vars(args))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode > 0:  # it has printed why
        sys.exit(process.returncode)
    if process.returncode < 0:
        sys.exit(f"benchmark.py: error: {variant} was killed ({process.returncode}).")
    return json.loads(process.stdout)


def measure(variants: list[str], args: argparse.Namespace) -> Measured:
    """Measure in turns."""
    measured: Measured = {}
    for turn in range(args.turns):
        # A B B A, so that a drift of the machine affects all variants alike.
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
                values = m[key].get(part, [])  # what is not GN+WS has no operators
                low, median, high = (
                    f(values) / size if values else 0.0 for f in (min, statistics.median, max)
                )
                ratio = median * size / (statistics.median(base) or 1)
                row.append(f"{median:.4g} ({low:.4g} - {high:.4g}) {ratio:.3f}x" if values else "")
            table.append(row)
    if len(measured) >= len(table):
        table = list(map(list, zip(*table)))
    return tabulate(table, "firstrow", "github", disable_numparse=True)


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = 2 if args.work == "train" else 1
    if args.runs is None:
        args.runs = 5 if args.work == "gpu" else 1
    if min(args.turns, args.runs, args.batch_size, *args.image_size) < 1:
        parser.error("--turns, --runs, --batch-size and --image-size must be at least 1")
    if args.dry_run:
        args.turns, args.runs, args.image_size, args.config_file = 1, 1, [64, 64], "quick_start"
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as e:
        parser.error(f"--output {args.output} cannot be written: {e.strerror}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all processes without a traceback
    title = shlex.join(["benchmark.py", *sys.argv[1:]])
    measured = measure(VARIANTS.get(args.work, args.models), args)
    machine = json.dumps(next(iter(measured.values()))["machine"])
    text = f"### {title}\n\n{format_table(measured)}\n\n{machine}\n"
    record = json.dumps({**vars(args), "variants": measured}, indent=1)
    for suffix, content in ((".md", text), (".json", record)):
        path = os.path.join(args.output, f"{args.work}{suffix}")
        with open(f"{path}.part", "w") as f:
            f.write(content)
        os.replace(f"{path}.part", path)
    print(text)


if __name__ == "__main__":
    main()
