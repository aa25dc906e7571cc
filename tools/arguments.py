"""Arguments that several scripts have. Without PyTorch, so that --help does not wait for it."""

import argparse
import os


def train_argument_parser() -> argparse.ArgumentParser:
    """
    The options of Detectron2's :func:`default_argument_parser`, which cannot be had without
    PyTorch, with ``--dataset`` and a free port by default. Under torchrun, its numbers of processes
    and machines are the defaults, and ``--resume``, when it has started them again.
    """
    parser = argparse.ArgumentParser(
        description="Train and evaluate GN+WS detectors.",
        epilog="Examples: --config-file configs/quick_start.yaml; the same with --num-gpus 8, or "
        "SOLVER.BASE_LR 0.01 at the end, or --eval-only MODEL.WEIGHTS output/model_final.pth.",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file of the model")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST"
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=_of_torchrun("LOCAL_WORLD_SIZE", 1),
        metavar="N",
        help="GPUs of this machine, or, with MODEL.DEVICE cpu, processes (default: 1)",
    )
    parser.add_argument(
        "--num-machines",
        type=int,
        default=_of_torchrun("GROUP_WORLD_SIZE", 1),
        metavar="N",
        help="machines that train together (default: 1)",
    )
    parser.add_argument(
        "--machine-rank",
        type=int,
        default=_of_torchrun("GROUP_RANK", 0),
        metavar="N",
        help="number of this machine, from 0",
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="tcp://HOST:PORT",
        help="address and free port of machine 0, where there are several",
    )
    add_dataset_argument(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="keys of the config and their values, after all options",
    )
    parser.set_defaults(resume=_of_torchrun("TORCHELASTIC_RESTART_COUNT", 0) > 0)
    return parser


def _of_torchrun(name: str, default: int) -> int:
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset``, for :func:`gnws_d2.data.register_coco_datasets`."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS.json", "IMAGE_ROOT"),
        help="register a dataset in COCO format, for use as NAME in DATASETS.TRAIN and "
        "DATASETS.TEST (repeatable)",
    )
