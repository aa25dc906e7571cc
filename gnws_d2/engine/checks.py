"""Checks of a job before it is launched."""

import argparse
import contextlib
import importlib.util
import os

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager

from ..checkpoint import find_checkpoint
from ..config import check_choice, check_device, flatten_config
from ..data import check_datasets
from ..data.augmentation import check_augmentation
from ..evaluation import check_evaluators
from ..utils.compat import LAUNCHES_ON_CPU
from ..utils.errors import UserError

# Keys whose values start at 0, and their largest ones.
_SHARES = {
    "INPUT.COPY_PASTE": 1.0,
    "MODEL.RPN.MIN_LOW_QUALITY_IOU": 1.0,
    "SOLVER.EMA_DECAY": 0.99999,
    "TEST.MAX_TIME_SHARE": 1.0,
}


def check_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check a job, download its weights, and raise :class:`UserError` for the first mistake."""
    check_device(cfg)
    check_choice("INPUT.ON_BAD_IMAGE", cfg.INPUT.ON_BAD_IMAGE, ("stop", "skip"))
    check_choice("SOLVER.ON_NON_FINITE", cfg.SOLVER.ON_NON_FINITE, ("stop", "skip"))
    values = flatten_config(cfg)
    for key, most in _SHARES.items():
        if not 0 <= values[key] <= most:  # also for NaN
            raise UserError(f"{key} is {values[key]}: set it to a number from 0.0 to {most}.")
    _check_workers(cfg, args)
    if cfg.WANDB.PROJECT and not args.eval_only and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"WANDB.PROJECT is {cfg.WANDB.PROJECT}, but Weights & Biases is not installed: "
            'pip install wandb, or set WANDB.PROJECT "".'
        )
    if not args.eval_only:
        _check_batch_size(cfg, args.num_gpus * args.num_machines)
        check_augmentation(cfg)
    is_launched = args.num_gpus > 1 and not dist.is_torchelastic_launched()
    if is_launched and cfg.MODEL.DEVICE == "cpu" and not LAUNCHES_ON_CPU:
        raise UserError(
            f"--num-gpus {args.num_gpus} with MODEL.DEVICE cpu: Detectron2 v0.6 launches several "
            "processes on GPUs only. Start them by torchrun --nproc-per-node "
            f"{args.num_gpus} train_net.py ..., without --num-gpus."
        )
    # One of the processes that torchrun starts on a machine checks the data.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        check_datasets(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
        check_evaluators(cfg)
    if args.eval_only and cfg.TEST.PREDICTIONS:
        if len(cfg.DATASETS.TEST) != 1:
            raise UserError(
                f"TEST.PREDICTIONS {cfg.TEST.PREDICTIONS} is for one dataset: name it alone in "
                f"DATASETS.TEST, which has {len(cfg.DATASETS.TEST)}."
            )
        return
    if args.resume and PathManager.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    if cfg.MODEL.WEIGHTS:
        find_checkpoint(cfg.MODEL.WEIGHTS)  # downloads it before anything is launched
    elif args.eval_only:
        raise UserError("MODEL.WEIGHTS is empty: --eval-only needs the checkpoint to evaluate.")


def check_precision(device: str, precision: str) -> None:
    """Raise :class:`UserError` for a precision that is unknown, or slow as the CPU emulates it."""
    check_choice("SOLVER.AMP.PRECISION", precision, ("float16", "bfloat16"))
    if device == "cpu" and not (precision == "bfloat16" and _cpu_has_bfloat16()):
        raise UserError(
            f"SOLVER.AMP.PRECISION {precision} is not for this CPU, which would emulate it (CPUs "
            "with AVX512_BF16, AMX or ARM's BF16 have bfloat16): set SOLVER.AMP.ENABLED False."
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
            f"{args.machine_rank}: at least one of each is needed, and ranks count from 0."
        )
    if dist.is_torchelastic_launched():
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            raise UserError(
                "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
                "environment: restarted processes would find the addresses of those that ended."
            )
    elif args.num_machines > 1 and not args.dist_url.startswith("tcp://"):
        raise UserError(
            f"--dist-url {args.dist_url}: for several machines set it to tcp://HOST:PORT, an "
            "address of machine 0 and a free port there."
        )
    gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > gpus:
        raise UserError(f"--num-gpus {args.num_gpus}, but PyTorch finds {gpus} GPUs.")


def _check_batch_size(cfg: CfgNode, num_workers: int) -> None:
    if cfg.SOLVER.AMP.ENABLED:
        check_precision(cfg.MODEL.DEVICE, cfg.SOLVER.AMP.PRECISION)
    reference, batch_size = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference and batch_size % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch_size} does not divide by SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}, the number of workers it is for: set SOLVER.REFERENCE_WORLD_SIZE 0 to "
            "use SOLVER.IMS_PER_BATCH as it is."
        )
    batch_size = DefaultTrainer.auto_scale_workers(cfg, num_workers).SOLVER.IMS_PER_BATCH
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    if batch_size < 1 or steps < 1 or batch_size % (num_workers * steps):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch_size} does not divide by {num_workers} workers "
            f"(--num-gpus times --num-machines) times SOLVER.ACCUMULATE_STEPS {steps}."
        )
