"""What can be known to be wrong with a job before any work is done."""

import argparse
import importlib.util
import logging
import os

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager

from ..config import check_choice
from ..data import check_coco_json
from ..utils.errors import UserError
from .launch import torchrun_options
from .machines import parse_dist_url


def check_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Check the devices, the weights, the datasets and the batch size of a job, before it is launched.

    Args:
        cfg: of :func:`get_config`.
        args: of ``train_net.py``.

    Raises:
        UserError: for the first thing that is wrong.
    """
    check_device(cfg)
    check_choice("INPUT.ON_BAD_IMAGE", cfg.INPUT.ON_BAD_IMAGE, ("stop", "skip"))
    check_choice("SOLVER.ON_NON_FINITE", cfg.SOLVER.ON_NON_FINITE, ("stop", "skip"))
    _check_workers(cfg, args)
    if cfg.WANDB.PROJECT and not args.eval_only and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"WANDB.PROJECT is {cfg.WANDB.PROJECT}, but Weights & Biases is not installed: "
            'pip install wandb, or set WANDB.PROJECT "".'
        )
    _check_classes(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    _check_weights(cfg, args)


def check_device(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: if ``MODEL.DEVICE`` is a GPU, and there is none.
    """
    if cfg.MODEL.DEVICE != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but PyTorch finds no GPU on this machine: set "
            "MODEL.DEVICE cpu to run on the CPU."
        )


def _check_workers(cfg: CfgNode, args: argparse.Namespace) -> None:
    for option, value in torchrun_options().items():
        if getattr(args, option) != value:
            raise UserError(
                f"--{option.replace('_', '-')} {getattr(args, option)} contradicts torchrun, which "
                f"says {value}: leave it out."
            )
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus {args.num_gpus}: at least one process is needed.")
    if args.num_machines < 1:
        raise UserError(f"--num-machines {args.num_machines}: at least one machine is needed.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank}: the ranks of --num-machines {args.num_machines} "
            f"go from 0 to {args.num_machines - 1}."
        )
    if dist.is_torchelastic_launched():
        if args.num_gpus * args.num_machines != int(os.environ["WORLD_SIZE"]):
            raise UserError(
                f"torchrun has started {args.num_gpus} processes on this machine and others on "
                "another: give it the same --nproc-per-node on all machines."
            )
    elif args.dist_url != "auto":
        parse_dist_url(args.dist_url)
    elif args.num_machines > 1:
        raise UserError(
            "--dist-url is not given: with several machines it is tcp://HOST:PORT, an address of "
            "machine 0 and a free port there."
        )
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {args.num_gpus}, but PyTorch finds {torch.cuda.device_count()} GPUs."
        )
    if args.eval_only:
        return
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise UserError("SOLVER.AMP.ENABLED True needs a GPU: set it to False on the CPU.")
    num_workers = args.num_gpus * args.num_machines
    reference, batch_size = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference and batch_size % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch_size} does not divide by SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}, the number of workers it is meant for: set SOLVER.REFERENCE_WORLD_SIZE "
            "0 to use SOLVER.IMS_PER_BATCH as it is."
        )
    batch_size = DefaultTrainer.auto_scale_workers(cfg, num_workers).SOLVER.IMS_PER_BATCH
    if batch_size < 1 or batch_size % num_workers:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch_size} does not divide by the {num_workers} workers "
            "(--num-gpus times --num-machines)."
        )


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    weights = cfg.MODEL.WEIGHTS
    if args.resume and PathManager.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    if weights.startswith("gnws://"):
        PathManager.get_local_path(weights)  # so that it is downloaded before anything is launched
    elif weights and "://" not in weights and not PathManager.isfile(weights):
        raise UserError(f"MODEL.WEIGHTS {weights} does not exist.")
    if not weights and args.eval_only:
        raise UserError("MODEL.WEIGHTS is empty: --eval-only needs the checkpoint to evaluate.")
    if not weights and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        logging.getLogger(__name__).warning(
            "MODEL.WEIGHTS is empty, so the layers that MODEL.BACKBONE.FREEZE_AT "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT} freezes keep their random values: set it to 0 to "
            "train from scratch."
        )


def check_test_dataset(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: if a dataset of ``DATASETS.TEST`` is not there, or has other classes than
            ``MODEL.ROI_HEADS.NUM_CLASSES``.
    """
    _check_classes(cfg, ("TEST",))


def _check_classes(cfg: CfgNode, keys: tuple[str, ...]) -> None:
    """Every dataset must be there, and have the classes that the model predicts."""
    classes = {}
    for key in keys:
        if not cfg.DATASETS[key] and key == "TRAIN":
            raise UserError("DATASETS.TRAIN is empty: name a dataset to train on.")
        for name in cfg.DATASETS[key]:
            if name not in classes:
                classes[name] = _dataset_classes(cfg, key, name)
    first = next(iter(classes), None)
    for name, names in classes.items():
        if names != classes[first]:
            raise UserError(
                f"The classes of the datasets {first} ({_join(classes[first])}) and {name} "
                f"({_join(names)}) differ: a model is trained and tested on the same classes."
            )
        check_num_classes(cfg, name, names)


def check_num_classes(cfg: CfgNode, dataset: str, classes: list[str]) -> None:
    """
    Raises:
        UserError: if the model has another number of classes than the dataset.
    """
    if len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but the dataset "
            f"{dataset} has {len(classes)} classes ({_join(classes)}): set "
            f"MODEL.ROI_HEADS.NUM_CLASSES {len(classes)}."
        )


def check_registered(key: str, dataset: str) -> None:
    """
    Raises:
        UserError: if there is no such dataset, which ``DATASETS.{key}`` names.
    """
    if dataset not in DatasetCatalog:
        raise UserError(
            f"DATASETS.{key} names {dataset}, which is not registered: add "
            f"--dataset {dataset} ANNOTATIONS.json IMAGE_ROOT."
        )


def _dataset_classes(cfg: CfgNode, key: str, name: str) -> list[str]:
    check_registered(key, name)
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    for what, path in (("annotation file", json_file), ("image directory", image_root)):
        if path is not None and not PathManager.exists(path):
            raise UserError(
                f"The {what} of the dataset {name} does not exist: {path}. (Datasets that come "
                "with Detectron2 are looked for in $DETECTRON2_DATASETS.)"
            )
    classes = metadata.get("thing_classes")
    # Classes that are known before the file is read are those of a dataset that comes with
    # Detectron2, or with us, and needs no check.
    if classes is not None:
        return classes
    evaluation = name in cfg.DATASETS.TEST
    return check_coco_json(
        json_file,
        image_root,
        masks=cfg.MODEL.MASK_ON,
        evaluation=evaluation,
        skip_bad_images=cfg.INPUT.ON_BAD_IMAGE == "skip" and not evaluation,
    )


def _join(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
