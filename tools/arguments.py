"""Arguments shared by the scripts. Imports no PyTorch, so that --help does not wait for it."""

import argparse
import importlib.util
import os


def train_argument_parser() -> argparse.ArgumentParser:
    """
    Build the parser of ``train_net.py``: the options of Detectron2's
    :func:`default_argument_parser`, which imports PyTorch, and ``--dataset``. Under torchrun the
    number of processes and machines default to torchrun's, and ``--resume`` to whether it is a
    restart.
    """
    parser = argparse.ArgumentParser(
        description="Train and evaluate GN+WS detectors.",
        epilog="Examples: --config-file configs/quick_start.yaml; the same with --num-gpus 8, or "
        "SOLVER.BASE_LR 0.01 at the end, or --eval-only MODEL.WEIGHTS output/model_final.pth.",
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="config of the model")
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    text = "GPUs per machine, or processes with MODEL.DEVICE cpu (default: 1)"
    add("--num-gpus", type=int, default=1, metavar="N", help=text)
    text = "total number of machines (default: 1)"
    add("--num-machines", type=int, default=1, metavar="N", help=text)
    add("--machine-rank", type=int, default=0, metavar="N", help="rank of this machine, from 0")
    add("--dist-url", default="auto", metavar="tcp://HOST:PORT", help="free port of machine 0")
    add_dataset_argument(parser)
    text = "config keys, after all options"
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=text)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.set_defaults(
            num_gpus=int(os.environ["LOCAL_WORLD_SIZE"]),
            num_machines=int(os.environ["GROUP_WORLD_SIZE"]),
            machine_rank=int(os.environ["GROUP_RANK"]),
            resume=int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0,
        )
    return parser


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if a local file that the options name does not exist."""
    for name, *paths in args.dataset:
        for path in paths:
            if "://" not in path and not os.path.exists(path):
                parser.error(f"--dataset {name}: {path} does not exist")
    if args.config_file and not os.path.exists(args.config_file):
        spec = importlib.util.find_spec("gnws_d2")  # without importing it
        assert spec and spec.origin
        configs = os.path.join(os.path.dirname(spec.origin), "model_zoo", "configs")
        name = os.path.basename(args.config_file).removesuffix(".yaml")
        if not os.path.exists(os.path.join(configs, f"{name}.yaml")):
            parser.error(f"--config-file {args.config_file} does not exist")


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset``, a list for :func:`gnws_d2.data.register_coco_datasets`."""
    metavar = ("NAME", "ANNOTATIONS.json", "IMAGE_ROOT")
    text = "register a COCO dataset as NAME, for DATASETS.TRAIN and DATASETS.TEST (repeatable)"
    parser.add_argument(
        "--dataset", nargs=3, action="append", default=[], metavar=metavar, help=text
    )
