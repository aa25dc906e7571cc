"""
The commands of ``gnws``, which train_net.py and the scripts beside this file also run. PyTorch is
imported after the arguments are parsed, so that --help and mistakes in them do not wait for it.
"""

import argparse
import logging
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from importlib.metadata import version

if not __package__:  # for a script in a clone, whose gnws_d2 need not be installed
    sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

# Newer versions of PyTorch warn about functions that Detectron2 and fvcore call.
for _message in ("`torch.jit.script` is deprecated", "torch.meshgrid: in an upcoming release"):
    warnings.filterwarnings("ignore", _message)
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: "is_fx_tracing" not in record.getMessage()
)


def main(command: str | None = None) -> None:
    """Run `command`, or that of the first argument, with the arguments of this process."""
    function = COMMANDS[command or _parse_command()]
    parser = ArgumentParser(os.path.basename(sys.argv[0]), description=function.__doc__)
    try:
        status = function(parser)
    except KeyboardInterrupt:  # perhaps during an import, so that nothing is imported here
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        from gnws_d2.utils.errors import exit_on_user_error

        with exit_on_user_error():
            raise
    if status is not None:
        sys.exit(status)


def _parse_command() -> str:
    """Return the command of ``gnws``, and leave what follows it in ``sys.argv``."""
    parser = ArgumentParser("gnws", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "GN+WS detectors for Detectron2."
    parser.epilog = "commands:\n"
    for name, function in COMMANDS.items():
        summary = " ".join((function.__doc__ or "").split()).split(". ")[0].rstrip(".")
        parser.epilog += f"  {name:15}{summary}\n"
    parser.epilog += "\n`gnws COMMAND --help` describes a command."
    parser.add_argument("--version", action="version", version=version("gnws_d2"))
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args()
    sys.argv = [f"gnws {args.command}", *args.arguments]
    return args.command


def add_train_arguments(parser: ArgumentParser) -> None:
    """
    Add the options of Detectron2's :func:`default_argument_parser`, which imports PyTorch, and
    ``--dataset``. Under torchrun the number of processes and machines default to torchrun's, and
    ``--resume`` to whether it is a restart.
    """
    parser.epilog = """Examples: --config-file configs/quick_start.yaml; the same with --num-gpus 8;
        with SOLVER.BASE_LR 0.01 at the end; with --eval-only MODEL.WEIGHTS model_final.pth."""
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


def _score(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a score from 0 to 1")
    return float(text)


def train(parser: ArgumentParser) -> None:
    """Train a model and evaluate it."""
    add_train_arguments(parser)
    args = parser.parse_args()
    from gnws_d2.engine.train_net import run, separate_evaluation

    separate_evaluation(args)
    run(args)


def evaluate(parser: ArgumentParser) -> None:
    """Evaluate a model: compute AP on a dataset."""
    parser.set_defaults(eval_only=True)
    train(parser)


def finetune(parser: ArgumentParser) -> None:
    """
    Train a model on your own data. Derive the settings from the data, which may be in any common
    format, train, evaluate the best checkpoint, and write a page about the run.
    """
    parser.epilog = """Example: --data my_pictures --output output/mine. All choices are config
        keys, and KEY VALUE pairs at the end override them."""
    add, files = parser.add_argument, ("ANNOTATIONS.json", "IMAGE_ROOT")
    text = "directory in any common format, data.yaml, or COCO file: see docs/own_data.md"
    add("--data", metavar="PATH", help=text)
    add("--train", nargs=2, metavar=files, help="training set in COCO format, instead of --data")
    add("--val", nargs=2, metavar=files, help="validation set (default: a fifth of the images)")
    add("--output", required=True, metavar="DIR", help="directory of the run")
    add("--model", metavar="NAME", help="model or config file (default: Mask or Faster R-CNN R-50)")
    _add_number(parser, "--epochs", 20, "how often each image is seen")
    _add_number(parser, "--batch-size", 2, "images in memory at once, per process")
    _add_number(parser, "--num-gpus", 1, "GPUs, or processes with MODEL.DEVICE cpu")
    _add_number(parser, "--patience", 0, "stop after N evaluations without a better AP; 0: never")
    text = "change images at random: color and scale (default), or also paste objects"
    add("--augment", choices=["none", "light", "strong"], help=text)
    add("--any-orientation", action="store_true", help="also turn images by quarter turns")
    add("--resume", action="store_true", help="continue the run in --output")
    text = "stop before the training: write the data and the config, and a page to look at the data"
    add("--dry-run", action="store_true", help=text)
    text = "train also if more than a tenth of the objects cannot be used"
    add("--keep-going", action="store_true", help=text)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys, at the end")
    args = parser.parse_args()
    import gnws_d2

    best = gnws_d2.finetune(**vars(args))
    if args.dry_run:
        return
    print(
        f"\nThe best checkpoint is {best}.\n"
        f"  predict: gnws demo --model {args.output} --input IMAGES --output PICTURES\n"
        f"  resume:  gnws finetune --resume --output {args.output}\n"
        f"  export:  gnws export --config-file {args.output}/config.yaml --format onnx --output "
        f"EXPORTED --images IMAGE MODEL.WEIGHTS {best}"
    )


def demo(parser: ArgumentParser) -> int:
    """
    Draw the detections of a model in images or a video. They are also written as COCO JSON. The
    exit status is 1 if an input cannot be read.
    """
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE", help="config of the model")
    text = "OUTPUT_DIR of a run, a checkpoint, name of a published model, or USER/REPO of the Hub"
    model.add_argument("--model", metavar="MODEL", help=text)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, directories, patterns")
    source.add_argument("--video-input", metavar="FILE", help="video file")
    text = "directory for the drawings and detections.json"
    add("--output", required=True, metavar="DIR", help=text)
    text = "minimum score, from 0 to 1 (default: the best one in the last evaluation, or else 0.5)"
    add("--threshold", "--confidence-threshold", type=_score, metavar="SCORE", help=text)
    text = "also write the detections of images as labels to correct, to labels_FORMAT in --output"
    add("--save-labels", choices=["labelme", "yolo", "voc", "coco"], help=text)
    add_dataset_argument(parser)
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs, at the end")
    args = parser.parse_args()
    if args.save_labels and not args.input:
        parser.error("--save-labels needs --input: a video has no pictures to label")
    from gnws_d2.prediction.demo import run_demo

    return run_demo(args)


def report(parser: ArgumentParser) -> None:
    """Write an HTML page about a run, RUN_DIR/report.html. AP is printed as well."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="OUTPUT_DIR of the run")
    add_dataset_argument(parser)
    args = parser.parse_args()
    from detectron2.utils.logger import setup_logger

    from gnws_d2.report import make_report

    setup_logger(name="gnws_d2")
    make_report(args.run_dir, args.dataset)


def convert(parser: ArgumentParser) -> None:
    """Convert a checkpoint to Detectron2's format or to MMDetection's."""
    parser.add_argument("input", metavar="IN", help="checkpoint in any known format")
    parser.add_argument("output", metavar="OUT", help="file to write")
    text, formats = "format of OUT (default: detectron2)", ["detectron2", "mmdet"]
    parser.add_argument("--to", choices=formats, default="detectron2", help=text)
    args = parser.parse_args()
    from gnws_d2 import checkpoint

    content = checkpoint.load_checkpoint(checkpoint.find_checkpoint(args.input))
    if args.to == "mmdet":
        content = checkpoint.convert_to_mmdet(content)
    checkpoint.save_checkpoint(content, args.output)


def export(parser: ArgumentParser) -> None:
    """
    Export a model as plain GN for stock Detectron2 ("folded"), TorchScript or ONNX. If its
    detections on the images differ, or int8 costs too much AP, the exit status is 1 and nothing is
    written.
    """
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="config of the model")
    add("--format", required=True, choices=["folded", "torchscript", "onnx"])
    add("--output", required=True, metavar="DIR", help="directory of the files")
    text = "image with objects that the model detects, or a directory, of which five are used"
    add("--images", required=True, metavar="PATH", help=text)
    text = "quantize convolutions to int8, calibrated on up to 100 of the images, and show AP "
    text += "before and after on the first dataset of DATASETS.TEST"
    add("--int8", action="store_true", help=text)
    text = "write no int8 model whose AP falls by more than this (default: 1)"
    add("--max-drop", type=float, default=1.0, metavar="POINTS", help=text)
    add_dataset_argument(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys, at the end")
    args = parser.parse_args()
    if args.int8 and args.format != "onnx":
        parser.error(f"--int8 needs --format onnx, not {args.format}")
    from detectron2.utils.logger import setup_logger

    from gnws_d2.config import choose_device, load_config
    from gnws_d2.data import register_coco_datasets
    from gnws_d2.export import export_model

    setup_logger(name="gnws_d2")
    setup_logger(name="detectron2.evaluation.evaluator")  # the progress of an evaluation
    cfg = load_config(args.config_file, args.opts, args.dataset)
    register_coco_datasets(cfg.DATASETS.COCO)
    choose_device(cfg)
    max_drop = args.max_drop if args.int8 else None
    export_model(cfg, args.format, args.output, args.images, max_drop)


def push(parser: ArgumentParser) -> None:
    """
    Share a trained model on the Hugging Face Hub: its weights, config, class names, threshold and a
    model card. Nothing of the training images or of this machine is sent.
    """
    parser.epilog = "Predict: gnws demo --model USER/REPO --input IMAGES --output PICTURES"
    add = parser.add_argument
    add("output_dir", metavar="OUTPUT_DIR", help="directory of the run")
    add("repo", metavar="USER/REPO", help="repository, which is created if it does not exist")
    add("--license", required=True, metavar="NAME", help="licence, such as apache-2.0")
    add("--picture", metavar="IMAGE", help="image for the model card to show detections on")
    add("--private", action="store_true", help="let only yourself see a new repository")
    args = parser.parse_args()
    from gnws_d2.export.hub import push_to_hub

    print(push_to_hub(**vars(args)))


def check_dataset(parser: ArgumentParser) -> int:
    """
    Read a dataset as `gnws finetune` does, and list what is repaired and what is left out. The exit
    status is 1 if anything is left out.
    """
    add = parser.add_argument
    add("data", metavar="PATH", help="directory in any common format, data.yaml, or COCO file")
    add("images", nargs="?", metavar="IMAGE_ROOT", help="directory of the images of a COCO file")
    args = parser.parse_args()
    from gnws_d2.data.formats import Notes, describe, read_coco_files, read_dataset

    notes, options = Notes(), {"skip_bad_images": True, "keep_going": True}
    if args.images:
        splits = read_coco_files({"all": (args.data, args.images)}, notes, **options)
    else:
        splits = read_dataset(args.data, notes, **options)
    for name, coco in splits.items():
        classes = ", ".join(c["name"] for c in coco["categories"])
        print(f"{name}: {describe(coco)}, of the classes {classes}")
    for verb, kinds in (("Repaired", notes.repairs), ("Left out", notes.left_out)):
        for kind, found in kinds.items():
            print(f"{verb} {len(found)} x {kind}", *found, sep="\n  ")
    return 1 if notes.left_out else 0


COMMANDS: dict[str, Callable[[ArgumentParser], int | None]] = {
    "train": train,
    "eval": evaluate,
    "finetune": finetune,
    "demo": demo,
    "report": report,
    "convert": convert,
    "export": export,
    "push": push,
    "check-dataset": check_dataset,
}
