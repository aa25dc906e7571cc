"""
The commands of ``gnws``, which the scripts beside this file and train_net.py run, too. PyTorch is
imported after the arguments are parsed: --help and mistakes in them do not wait for it.
"""

import argparse
import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from argparse import ArgumentParser
from collections import defaultdict
from importlib.metadata import version

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if not __package__:  # for a script in a clone, whose gnws_d2 need not be installed
    sys.path.insert(1, _ROOT)

# What Detectron2 and fvcore use of PyTorch that newer versions warn about.
for _message in ("`torch.jit.script` is deprecated", "torch.meshgrid: in an upcoming release"):
    warnings.filterwarnings("ignore", _message)
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: "is_fx_tracing" not in record.getMessage()
)

# As `gnws_d2.utils.process.end_with_parent`, which cannot be called before imports of some seconds.
_is_started = "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process()
if _is_started and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(command: str | None = None) -> None:
    """Run a command with the arguments of this process, or ``gnws``, whose first one names it."""
    function, _ = COMMANDS[command or _parse_command()]
    parser = ArgumentParser(os.path.basename(sys.argv[0]), description=function.__doc__)
    try:
        status = function(parser)
    except (Exception, KeyboardInterrupt):
        from gnws_d2.utils.errors import exit_on_user_error

        exit_on_user_error(_raise_again)()
    if status is not None:
        sys.exit(status)


def _raise_again() -> None:
    raise


def _parse_command() -> str:
    """Return the command of ``gnws``, and leave what follows it in ``sys.argv``."""
    parser = ArgumentParser("gnws", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "GN+WS detectors for Detectron2."
    texts = "".join(f"  {name:15}{text}\n" for name, (_, text) in COMMANDS.items())
    parser.epilog = f"commands:\n{texts}\n`gnws COMMAND --help` describes a command."
    parser.add_argument("--version", action="version", version=version("gnws_d2"))
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args()
    sys.argv = [f"gnws {args.command}", *args.arguments]
    if args.command == "eval":
        sys.argv.insert(1, "--eval-only")
    return args.command


def add_train_arguments(parser: ArgumentParser) -> None:
    """
    Add the options of Detectron2's :func:`default_argument_parser`, which imports PyTorch, and
    ``--dataset``. Under torchrun the number of processes and machines default to torchrun's, and
    ``--resume`` to whether it is a restart.
    """
    parser.epilog = """Examples: --config-file configs/quick_start.yaml; the same with --num-gpus 8,
        or SOLVER.BASE_LR 0.01 at the end, or --eval-only MODEL.WEIGHTS output/model_final.pth."""
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="config of the model")
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    _add_number(parser, "--num-gpus", 1, "GPUs per machine, or processes with MODEL.DEVICE cpu")
    _add_number(parser, "--num-machines", 1, "total number of machines")
    _add_number(parser, "--machine-rank", 0, "rank of this machine, from 0")
    add("--dist-url", default="auto", metavar="tcp://HOST:PORT", help="free port of machine 0")
    add_dataset_argument(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys, at the end")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.set_defaults(
            num_gpus=int(os.environ["LOCAL_WORLD_SIZE"]),
            num_machines=int(os.environ["GROUP_WORLD_SIZE"]),
            machine_rank=int(os.environ["GROUP_RANK"]),
            resume=int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0,
        )


def add_dataset_argument(parser: ArgumentParser) -> None:
    """Add ``--dataset``, a list for :func:`gnws_d2.data.register_coco_datasets`."""
    add, metavar = parser.add_argument, ("NAME", "ANNOTATIONS.json", "IMAGE_ROOT")
    text = "register a COCO dataset as NAME, for DATASETS.TRAIN and DATASETS.TEST (repeatable)"
    add("--dataset", nargs=3, action="append", default=[], metavar=metavar, help=text)


def _add_number(parser: ArgumentParser, option: str, default: int, text: str) -> None:
    text += f" (default: {default})"
    parser.add_argument(option, type=int, default=default, metavar="N", help=text)


def _check_paths(parser: ArgumentParser, option: str, paths: list[str]) -> None:
    for path in paths:
        if "://" not in path and not os.path.exists(path):
            parser.error(f"{option} {path} does not exist")


def train(parser: ArgumentParser) -> None:
    """Train and evaluate GN+WS detectors."""
    add_train_arguments(parser)
    args = parser.parse_args()
    for name, *paths in args.dataset:
        _check_paths(parser, f"--dataset {name}:", paths)
    configs = os.path.join(_ROOT, "gnws_d2", "model_zoo", "configs")
    name = os.path.basename(args.config_file).removesuffix(".yaml")
    if args.config_file and f"{name}.yaml" not in os.listdir(configs):
        _check_paths(parser, "--config-file", [args.config_file])
    from gnws_d2.engine.train_net import run, separate_evaluation

    separate_evaluation(args)
    run(args)


def finetune(parser: ArgumentParser) -> None:
    """
    Train a model on your own data, in any common format: derive the settings from the data, train,
    evaluate the best checkpoint, and write a page about it.
    """
    parser.epilog = """Example: --data my_pictures --output output/mine. All choices are config
        keys, and KEY VALUE pairs at the end override them."""
    add, files = parser.add_argument, ("ANNOTATIONS.json", "IMAGE_ROOT")
    add("--data", metavar="DIR", help="COCO, YOLO, Pascal VOC, labelme, or images beside masks")
    add("--train", nargs=2, metavar=files, help="training set in COCO format, instead of --data")
    add("--val", nargs=2, metavar=files, help="validation set (default: a fifth of the images)")
    add("--output", required=True, metavar="DIR", help="directory of the run")
    text = "name of a model, or config file (default: a Mask or Faster R-CNN R-50, as the data is)"
    add("--model", metavar="NAME", help=text)
    _add_number(parser, "--epochs", 20, "the times that each image is seen")
    _add_number(parser, "--batch-size", 2, "images that a process holds at once, of its batch")
    _add_number(parser, "--num-gpus", 1, "GPUs, or processes with MODEL.DEVICE cpu")
    _add_number(parser, "--patience", 0, "stop after N evaluations without a better AP; 0: never")
    add("--resume", action="store_true", help="continue the run in --output")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys, at the end")
    args = parser.parse_args()
    _check_paths(parser, "--data", [args.data] if args.data else [])
    _check_paths(parser, "--train", args.train or [])
    _check_paths(parser, "--val", args.val or [])
    import gnws_d2

    best = gnws_d2.finetune(**vars(args))
    print(
        f"\nThe best checkpoint is {best}.\n"
        f"  predict: gnws demo --model {args.output} --input IMAGES --output PICTURES\n"
        f"  resume:  gnws finetune --resume --output {args.output}\n"
        f"  export:  gnws export --config-file {args.output}/config.yaml --format onnx --output "
        f"EXPORTED --images IMAGE MODEL.WEIGHTS {best}"
    )


def demo(parser: ArgumentParser) -> int:
    """
    Detect objects in images or a video: draw them, and write them as COCO JSON. Detectron2's demo,
    with `--model` for trained models. The exit status is 1 if an input cannot be read.
    """
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE", help="config of the model")
    text = "trained model: OUTPUT_DIR of a run, a checkpoint in it, or name of a published model"
    model.add_argument("--model", metavar="MODEL", help=text)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, directories, patterns")
    source.add_argument("--video-input", metavar="FILE", help="video file")
    source.add_argument("--webcam", action="store_true", help="show what the webcam sees")
    text = "directory for the drawings and detections.json, or file for a single drawing, with the "
    text += "JSON beside it (default: show a window; any key for the next image, Esc to quit)"
    add("--output", metavar="PATH", help=text)
    text = "minimum score, from 0 to 1 (default: 0.5)"
    add("--confidence-threshold", type=float, default=0.5, metavar="SCORE", help=text)
    add("--no-labels", action="store_true", help="draw no names and scores")
    add("--no-boxes", action="store_true", help="draw masks alone, if there are any")
    add_dataset_argument(parser)
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs, at the end")
    args = parser.parse_args()
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold {args.confidence_threshold} is not from 0 to 1")
    if args.webcam and args.output:
        parser.error("--webcam only shows a window: leave --output out")
    from gnws_d2.prediction.demo import run_demo

    return run_demo(args)


def report(parser: ArgumentParser) -> None:
    """Write one HTML page about a run of train_net.py, RUN_DIR/report.html, and print its AP."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="OUTPUT_DIR of the run")
    add_dataset_argument(parser)
    args = parser.parse_args()
    from detectron2.utils.logger import setup_logger

    from gnws_d2.report import make_report

    setup_logger(name="gnws_d2")
    make_report(args.run_dir, args.dataset)


def convert(parser: ArgumentParser) -> None:
    """Convert a checkpoint to Detectron2's format, or from there to MMDetection's."""
    parser.add_argument("input", metavar="IN", help="a checkpoint of any known format")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    text, formats = "format of OUT (default: detectron2)", ["detectron2", "mmdet"]
    parser.add_argument("--to", choices=formats, default="detectron2", help=text)
    args = parser.parse_args()
    from gnws_d2.checkpoint import convert_to_mmdet, load_checkpoint, save_checkpoint

    checkpoint = load_checkpoint(args.input)
    save_checkpoint(convert_to_mmdet(checkpoint) if args.to == "mmdet" else checkpoint, args.output)


def export(parser: ArgumentParser) -> None:
    """
    Export a trained model: folded (plain GN, for stock Detectron2), TorchScript or ONNX. If it does
    not give the same detections on the images, or loses AP in int8, the exit status is 1 and
    nothing is written.
    """
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="config of the model")
    add("--format", required=True, choices=["folded", "torchscript", "onnx"])
    add("--output", required=True, metavar="DIR", help="directory of the files")
    text = "image with objects that the model knows, or a directory, for its first five"
    add("--images", required=True, metavar="PATH", help=text)
    text = "quantize convolutions to int8, calibrated on up to 100 of the images, and show AP "
    text += "before and after on the first dataset of DATASETS.TEST"
    add("--int8", action="store_true", help=text)
    text = "refuse an int8 model with an AP that falls by more points (default: 1)"
    add("--max-drop", type=float, metavar="POINTS", help=text)
    add_dataset_argument(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys, at the end")
    args = parser.parse_args()
    if args.int8 and args.format != "onnx":
        parser.error(f"--int8 needs --format onnx, not {args.format}")
    if args.max_drop is not None and not args.int8:
        parser.error("--max-drop needs --int8")
    max_drop = 1.0 if args.max_drop is None else args.max_drop
    if not max_drop >= 0:  # or NaN
        parser.error(f"argument --max-drop: {max_drop:g} is not a number of points, 0 or more")
    from detectron2.utils.logger import setup_logger

    from gnws_d2.config import choose_device, load_config
    from gnws_d2.data import register_coco_datasets
    from gnws_d2.export import export_model

    setup_logger(name="gnws_d2")
    setup_logger(name="detectron2.evaluation.evaluator")  # the progress of an evaluation
    cfg = load_config(args.config_file, args.opts, args.dataset)
    register_coco_datasets(cfg.DATASETS.COCO)
    choose_device(cfg)
    drop = max_drop if args.int8 else None
    export_model(cfg, args.format, args.output, args.images, drop)


def check_dataset(parser: ArgumentParser) -> int:
    """List the issues of a dataset in COCO format. The exit status is 1 if there are any."""
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS", help="the JSON file")
    add("images", metavar="IMAGES", help="the directory of the images")
    add("--no-images", action="store_true", help="do not open the images")
    add("--output", metavar="FILE.json", help="file to write all issues to")
    args = parser.parse_args()
    output_dir = os.path.dirname(os.path.abspath(args.output or ""))
    _check_paths(parser, "the directory", [args.images, output_dir])
    from gnws_d2.data.check import Issue, check_dataset
    from gnws_d2.utils.files import atomic_write

    kinds: dict[str, list[Issue]] = defaultdict(list)
    for issue in check_dataset(args.annotations, args.images, open_images=not args.no_images):
        kinds[f"{issue.level}: {issue.item} {issue.key}"].append(issue)
    for kind, found in sorted(kinds.items()):
        more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
        print("\n  ".join([f"{kind} ({len(found)})", *(i.message for i in found[:10]), *more]))
    issues = [issue._asdict() for found in kinds.values() for issue in found]
    print(f"{args.annotations}: {len(issues)} issues")
    if args.output:
        counts = {kind: len(found) for kind, found in kinds.items()}
        content = {"annotations": args.annotations, "images": args.images, "counts": counts}
        with atomic_write(args.output) as f:
            json.dump({**content, "issues": issues}, f, indent=1)
    return 1 if issues else 0


def benchmark(parser: ArgumentParser) -> None:
    sys.path.insert(0, os.path.dirname(__file__))  # as when it is run as a script
    from benchmark import main

    main()


COMMANDS = {
    "train": (train, "train a model and evaluate it"),
    "eval": (train, "evaluate a model: AP on a dataset"),
    "finetune": (finetune, "train a model on your own data, in any common format"),
    "demo": (demo, "draw what a model detects in images or a video"),
    "report": (report, "write an HTML page about a run"),
    "convert": (convert, "convert a checkpoint from or to MMDetection's format"),
    "export": (export, "export a model as plain GN, TorchScript or ONNX"),
    "check-dataset": (check_dataset, "list all problems of a dataset"),
    "benchmark": (benchmark, "measure speed and memory"),
}
