"""Checks of a job before any work is done."""

import argparse
import contextlib
import importlib.util
import logging
import os
import re

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager

from ..checkpoint.checkpointer import find_checkpoint
from ..config import check_choice, check_device
from ..data import check_datasets
from ..evaluation import check_evaluators
from ..utils.compat import LAUNCHES_ON_CPU, detectron2_version
from ..utils.errors import UserError


def check_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Check the devices, weights, datasets and batch size of a job before it is launched, and raise
    :class:`UserError` for the first mistake.
    """
    check_device(cfg)
    check_choice("INPUT.ON_BAD_IMAGE", cfg.INPUT.ON_BAD_IMAGE, ("stop", "skip"))
    check_choice("SOLVER.ON_NON_FINITE", cfg.SOLVER.ON_NON_FINITE, ("stop", "skip"))
    _check_workers(cfg, args)
    _check_launcher(cfg, args)
    if cfg.WANDB.PROJECT and not args.eval_only and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"WANDB.PROJECT is {cfg.WANDB.PROJECT}, but Weights & Biases is not installed: "
            'pip install wandb, or set WANDB.PROJECT "".'
        )
    # Of the processes that torchrun starts on a machine, one is enough.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        check_datasets(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
        check_evaluators(cfg)
    if args.eval_only and cfg.TEST.PREDICTIONS:
        if len(cfg.DATASETS.TEST) != 1:
            raise UserError(
                f"TEST.PREDICTIONS {cfg.TEST.PREDICTIONS} is of one dataset: name it alone in "
                f"DATASETS.TEST, which has {len(cfg.DATASETS.TEST)}."
            )
        return
    _check_weights(cfg, args)


def check_precision(device: str, precision: str) -> None:
    """
    Raise :class:`UserError` for a ``SOLVER.AMP.PRECISION`` that is unknown, or that the CPU only
    emulates, which takes minutes an image.
    """
    check_choice("SOLVER.AMP.PRECISION", precision, ("float16", "bfloat16"))
    if device == "cpu" and not (precision == "bfloat16" and _cpu_has_bfloat16()):
        raise UserError(
            f"SOLVER.AMP.PRECISION {precision} is not for this CPU, which would emulate it (only "
            "bfloat16, with AVX512_BF16, AMX, or BF16 of ARM): set SOLVER.AMP.ENABLED False."
        )


def _cpu_has_bfloat16() -> bool:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        # "flags" on x86, "Features" on ARM.
        flags = next((line.split() for line in f if line.startswith(("flags", "Features"))), [])
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
    return False


def _check_workers(cfg: CfgNode, args: argparse.Namespace) -> None:
    if args.num_gpus < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} --machine-rank "
            f"{args.machine_rank}: there is at least one of each, and ranks count from 0."
        )
    if dist.is_torchelastic_launched():
        if args.num_gpus * args.num_machines != int(os.environ["WORLD_SIZE"]):
            raise UserError(
                f"torchrun has started {os.environ['WORLD_SIZE']} processes, not --num-gpus "
                f"{args.num_gpus} on --num-machines {args.num_machines}: leave these options out, "
                "and give torchrun the same --nproc-per-node on all machines."
            )
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            raise UserError(
                "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
                "environment: restarted processes would find the addresses of the ended ones."
            )
    elif not re.fullmatch(
        r"tcp://[^/:]+:\d+/?" + "|auto" * (args.num_machines == 1), args.dist_url
    ):
        raise UserError(
            f"--dist-url {args.dist_url}: with several machines it is tcp://HOST:PORT, an address "
            "of machine 0 and a free port there."
        )
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but PyTorch finds {gpus} GPUs.")
    if args.eval_only:
        return
    if cfg.SOLVER.AMP.ENABLED:
        check_precision(cfg.MODEL.DEVICE, cfg.SOLVER.AMP.PRECISION)
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
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    if steps < 1 or batch_size // num_workers % steps:
        raise UserError(
            f"SOLVER.ACCUMULATE_STEPS {steps} does not divide the {batch_size // num_workers} "
            "images of a worker (SOLVER.IMS_PER_BATCH divided by the number of workers)."
        )


def _check_launcher(cfg: CfgNode, args: argparse.Namespace) -> None:
    alone = args.num_gpus * args.num_machines == 1
    if alone or dist.is_torchelastic_launched() or cfg.MODEL.DEVICE != "cpu" or LAUNCHES_ON_CPU:
        return
    raise UserError(
        f"--num-gpus {args.num_gpus} with MODEL.DEVICE cpu: Detectron2 {detectron2_version()} "
        f"launches several processes on GPUs only. Start them by torchrun --nproc-per-node "
        f"{args.num_gpus} train_net.py ..., without --num-gpus."
    )


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    weights = cfg.MODEL.WEIGHTS
    if args.resume and PathManager.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    if weights:
        find_checkpoint(weights)  # downloads it before anything is launched
    elif args.eval_only:
        raise UserError("MODEL.WEIGHTS is empty: --eval-only needs the checkpoint to evaluate.")
    elif cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        logging.getLogger(__name__).warning(
            "MODEL.WEIGHTS is empty, so the layers that MODEL.BACKBONE.FREEZE_AT "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT} freezes keep their random values: set it to 0 to "
            "train from scratch."
        )
