#!/usr/bin/env python3
"""
Measure GN+WS beside plain GN, frozen BatchNorm and the reference formula.

ops: weight standardization and GroupNorm + ReLU alone. inference, train: whole models, in float32
and mixed precision. dataloader: the mappers. scale: evaluation, start and report on data of COCO's
size, beside Detectron2. gpu: all that is to be known of a GPU, in 8 minutes: operators, models,
memory and correctness, in float32 and both half types. Each variant has a process of its own, and
they take turns. Writes a table in Markdown and all times in JSON.
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

from gnws_tools.arguments import add_dataset_argument

MODELS = ["GN+WS", "GN", "GN+WS, reference", "GN, Detectron2", "FrozenBN"]
ALL_MODELS = [*MODELS, *(f"{name}, AMP" for name in MODELS)]
OTHERS = {
    "ops": ["fused", "PyTorch"],
    "dataloader": ["OpenCVDatasetMapper", "DatasetMapper"],
}
SCALE = {  # of the work "scale", by job
    "box AP": ["Detectron2", "gnws_d2"],
    "mask AP": ["Detectron2", "gnws_d2"],
    "load": ["Detectron2", "gnws_d2"],  # gnws_d2 checks, too
    "check": ["gnws_d2"],  # its memory is what is left afterwards
    "report": ["gnws_d2"],
    "image, 0 workers": ["Detectron2", "gnws_d2"],  # of the training loader
    "image, 2 workers": ["Detectron2", "gnws_d2"],
    "first iteration": ["gnws_d2"],  # from the command, with a small model
}
PRECISIONS = ["float32", "float16", "bfloat16"]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", choices=["ops", "inference", "train", "dataloader", "scale", "gpu"])
    add("--config-file", default="mask_rcnn_R50_gnws_2x", metavar="FILE")
    names = (
        f"of inference and train: {'; '.join(MODELS)}; each also with ', AMP' (default: without)"
    )
    add("--models", nargs="+", choices=ALL_MODELS, default=MODELS, metavar="NAME", help=names)
    add("--image-size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"))
    add("--batch-size", type=int, help="default: 1, or 2 for train")
    add("--turns", type=int, default=3, help="of each variant (default: 3)")
    add("--runs", type=int, help="timed in each turn (default: 1, or 15 for gpu)")
    add("--output", default="output/benchmark", metavar="DIR")
    add("--share", type=float, default=1.0, help="of COCO's size, for scale (default: 1)")
    add("--dry-run", action="store_true", help="gpu: small and on the CPU, to test the benchmark")
    add("--pycocotools", action="store_true", help="scale: measure it as well, for minutes")
    add_dataset_argument(parser)
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="such as MODEL.DEVICE cpu")
    return parser


def measure_variant(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own; return what it has written."""
    name = {"scale": "scale", "gpu": "gpu"}.get(args.work, "variants")
    script = os.path.join(os.path.dirname(__file__), f"benchmark_{name}.py")
    command = [sys.executable, script, variant, json.dumps(vars(args))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode > 0:  # it has printed why
        sys.exit(process.returncode)
    if process.returncode < 0:
        sys.exit(f"benchmark.py: error: {variant} was killed ({process.returncode}).")
    return json.loads(process.stdout)


def measure(variants: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """
    Measure in turns.

    Returns:
        By variant ``machine``, ``memory_bytes`` and ``seconds``, the times of each part of it.
    """
    measured: dict[str, dict[str, Any]] = {}
    for turn in range(args.turns):
        # A B B A, so that a drift of the machine affects all variants alike.
        for variant in variants[:: -1 if turn % 2 else 1]:
            result = measure_variant(variant, args)
            for part, seconds in measured.setdefault(variant, result)["seconds"].items():
                seconds += result["seconds"][part] if turn else []
    return measured


def measure_gpu(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure the operators, then the models in each precision; see ``benchmark_gpu.py``."""
    precisions = PRECISIONS
    if args.dry_run:
        args.image_size, args.runs, precisions = [64, 64], 1, PRECISIONS[:2]
        args.opts += ["MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"]
        args.opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"]
        args.opts += ["TEST.DETECTIONS_PER_IMAGE", "5"]
    return {variant: measure_variant(variant, args) for variant in ["operators", *precisions]}


def measure_scale(args: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure the jobs of ``SCALE``. Returns what :func:`measure` does, by job."""
    args.job = ""
    measure(["make"], argparse.Namespace(**{**vars(args), "turns": 1}))
    measured = {}
    for args.job, variants in SCALE.items():
        more = ["pycocotools"] if args.pycocotools and args.job.endswith("AP") else []
        measured[args.job] = measure([*variants, *more], args)
        for row in _rows(measured[args.job]):
            print(*row, sep="  ", file=sys.stderr)
    return measured


def format_table(measured: dict[str, dict[str, Any]]) -> str:
    """
    Return a Markdown table: times in ms; of models, memory at the peak over that before they were
    built, in GiB; and the ratios of both to those of the first variant.
    """
    first = next(iter(measured))
    columns = 7 if first in ALL_MODELS else 5
    header = ["", "", "ms", "min - max", f"/ {first}", "GiB", f"/ {first}"]
    rows = [row[:columns] for row in _rows(measured)]
    return tabulate(rows, header[:columns], "github", disable_numparse=True)


def format_scale(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a Markdown table of what :func:`measure_scale` returns."""
    header = ["", "", "ms", "min - max", "/ first", "GiB", "/ first"]
    rows = [row for of_job in measured.values() for row in _rows(of_job)]
    return tabulate(rows, header, "github", disable_numparse=True)


def format_gpu(measured: dict[str, dict[str, Any]]) -> str:
    """Return Markdown tables of what :func:`measure_gpu` returns."""
    operators = measured["operators"]
    rows = []
    for row in operators["rows"]:
        forward, both = row["forward"], row["forward and backward"]
        share = row["bytes"] / (forward["triton"] / 1e3) / operators["copy_bandwidth"]
        name = f"{row['operator']} {' x '.join(map(str, row['shape']))}, {row['precision']}"
        others = [f"{forward['torch'] / forward['triton']:.2f}x"]
        others.append(f"{forward.get('channels-last', forward['torch']) / forward['triton']:.2f}x")
        rows.append([name, *(f"{forward[n] * 1e3:.1f}" for n in ("triton", "torch")), *others])
        rows[-1] += [f"{share:.0%}", f"{both['torch'] / both['triton']:.2f}x"]
        rows[-1] += [f"{both['torch'] / both['auto']:.2f}x", f"{max(row['error']):.0e}"]
    header = ["forward on the GPU", "Triton, us", "PyTorch, us", "PyTorch / Triton"]
    header += ["channels-last / Triton", "of copy bandwidth", "with backward, PyTorch / Triton"]
    header += ["PyTorch / auto", "largest error"]
    tables = [tabulate(rows, header, "github", disable_numparse=True)]
    tables.append(f"Copy bandwidth: {operators['copy_bandwidth'] / 1e12:.2f} TB/s.")
    rows = []
    exact = measured["float32"]["parts"]
    for part in exact:
        for precision, of_precision in list(measured.items())[1:]:
            models = of_precision["parts"][part]
            for model, m in models.items():
                low = min(m["seconds"])
                row = [part, model, precision, f"{statistics.median(m['seconds']) * 1e3:.1f}"]
                row += [f"{low * 1e3:.1f}", f"{m['gpu_seconds'] * 1e3:.1f}"]
                for base in (models["FrozenBN"], exact[part][model]):
                    row.append(f"{low / min(base['seconds']):.3f}x")
                    row.append(f"{m['gpu_seconds'] / (base['gpu_seconds'] or 1):.3f}x")
                row.append(f"{m['memory_bytes'] / 2**30:.2f}")
                row.append(f"{m['memory_bytes'] / (exact[part][model]['memory_bytes'] or 1):.2f}x")
                rows.append(row)
    header = ["", "", "", "ms, median", "ms, least", "ms on the GPU", "/ FrozenBN", "on the GPU"]
    header += ["/ float32", "on the GPU", "GiB", "/ float32"]
    tables.append(tabulate(rows, header, "github", disable_numparse=True))
    tables += [f"{variant}: {m['choices']}" for variant, m in measured.items() if m["choices"]]
    return "\n\n".join(tables)


def _rows(measured: dict[str, dict[str, Any]]) -> list[list[str]]:
    of_first, rows = next(iter(measured.values())), []
    for part in of_first["seconds"]:
        base = statistics.median(of_first["seconds"][part])
        for variant, m in measured.items():
            times, memory = m["seconds"][part], m["memory_bytes"]
            low, median, high = (f(times) for f in (min, statistics.median, max))
            row = [part, variant, f"{median * 1e3:.4g}", f"{low * 1e3:.4g} - {high * 1e3:.4g}"]
            row += [f"{median / base:.3f}x", f"{memory / 2**30:.2f}"]
            row.append(f"{memory / (of_first['memory_bytes'] or 1):.3f}x")
            rows.append(row)
    return rows


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = 2 if args.work == "train" else 1
    args.runs = args.runs if args.runs is not None else 15 if args.work == "gpu" else 1
    if min(args.turns, args.runs, args.batch_size, *args.image_size) < 1:
        parser.error("--turns, --runs, --batch-size and --image-size must be at least 1")
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as e:
        parser.error(f"--output {args.output} cannot be written: {e.strerror}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all processes without a traceback
    title = shlex.join(["benchmark.py", *sys.argv[1:]])
    measured: dict[str, Any]
    if args.work == "scale":
        measured = measure_scale(args)
        table, of_first = format_scale(measured), measured["load"]
    elif args.work == "gpu":
        measured = of_first = measure_gpu(args)
        table = format_gpu(measured)
    else:
        measured = of_first = measure(OTHERS.get(args.work, args.models), args)
        table = format_table(measured)
    machine = next(iter(of_first.values()))["machine"]
    text = f"### {title}\n\n{table}\n\n{json.dumps(machine)}\n"
    record = json.dumps({**vars(args), "variants": measured}, indent=1)
    for suffix, content in ((".md", text), (".json", record)):
        with open(os.path.join(args.output, f"{args.work}{suffix}"), "w") as f:
            f.write(content)
    print(text)


if __name__ == "__main__":
    main()
