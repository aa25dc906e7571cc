"""A job of ``train_net.py``: check it, launch it, and train or evaluate in each process."""

import argparse
import atexit
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import default_setup as _default_setup
from detectron2.engine import launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import distributed as dist
from torch import nn

from ..checkpoint import GNWSCheckpointer
from ..config import choose_device, find_config_file, load_config
from ..data import register_coco_datasets
from ..data.coco import dataset_classes
from ..evaluation import evaluate_predictions
from ..modeling.backbone import check_keys
from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.process import end_with_parent, keep_freed_memory, num_usable_cores
from .checks import check_setup
from .defaults import Trainer
from .launch import agree_on_kernels, join_torchrun, leave_process_group, lock_output_dir, supervise


def get_config(args: argparse.Namespace) -> CfgNode:
    """Read the config of the command line (:func:`load_config`), and register its datasets."""
    if not args.config_file:
        raise UserError("No config file: give --config-file, such as configs/quick_start.yaml.")
    args.config_file = find_config_file(args.config_file)
    cfg = load_config(args.config_file, args.opts, args.dataset)
    register_coco_datasets(cfg.DATASETS.COCO)
    if args.eval_only:
        choose_device(cfg)
    return cfg


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Detectron2's :func:`default_setup`, with settings for CPUs, and processes that end with their
    launcher. An evaluation in the ``OUTPUT_DIR`` of a training leaves its ``config.yaml`` alone.
    """
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    if on_cpu and cfg.MODEL.GNWS.KERNELS != "reference":
        keep_freed_memory()
    if comm.get_world_size() > 1:
        end_with_parent()
        atexit.register(leave_process_group)
        if on_cpu and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, num_usable_cores() // comm.get_local_size()))
    if not on_cpu and check_keys(cfg) in ("auto", "triton"):
        agree_on_kernels(cfg, torch.empty(0, device=cfg.MODEL.DEVICE).device)
    config_file = Path(cfg.OUTPUT_DIR, "config.yaml")
    is_trained = args.eval_only and Path(cfg.OUTPUT_DIR, "run.json").is_file()
    config_of_training = config_file.read_text() if is_trained else ""
    _default_setup(cfg, args)
    if config_of_training and comm.is_main_process():
        with atomic_write(str(config_file)) as f:
            f.write(config_of_training)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gnws_d2")
    for handler in logging.getLogger("detectron2").handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            # The error ends the command with a message; its traceback is for log.txt.
            handler.addFilter(lambda record: not record.exc_info)


def main(args: argparse.Namespace) -> dict | None:
    """Train, or evaluate with ``--eval-only``, as one of the processes of a job."""
    cfg = get_config(args)
    default_setup(cfg, args)

    if args.eval_only:
        results = _evaluate(cfg, args)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def _evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict:
    if cfg.TEST.PREDICTIONS:
        return evaluate_predictions(cfg) if comm.is_main_process() else {}
    model = Trainer.build_model(cfg)
    classes = dataset_classes(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
    checkpointer = GNWSCheckpointer(model, cfg.OUTPUT_DIR, strict=True, classes=classes)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    return Trainer.test(cfg, model)


def separate_evaluation(args: argparse.Namespace) -> None:
    """Make ``--eval-only`` in the ``OUTPUT_DIR`` of a training write into ``evaluation/`` there."""
    if not args.eval_only:
        return
    output_dir = get_config(args).OUTPUT_DIR
    if not os.path.isfile(os.path.join(output_dir, "run.json")):
        return
    if args.resume:
        last = Checkpointer(nn.Module(), output_dir).get_checkpoint_file()
        args.resume, args.opts = False, [*args.opts, *(("MODEL.WEIGHTS", last) if last else ())]
    args.opts = [*args.opts, "OUTPUT_DIR", os.path.join(output_dir, "evaluation")]


def run(args: argparse.Namespace) -> None:
    """Check a job, given by the options of ``train_net.py``, and launch :func:`main`."""
    cfg = get_config(args)
    check_setup(cfg, args)
    with lock_output_dir(cfg, args):
        if dist.is_torchelastic_launched():
            join_torchrun(cfg, args)
            main(args)
            return
        with supervise(cfg, args.num_gpus * args.num_machines):
            launch(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
                timeout=timedelta(seconds=cfg.DISTRIBUTED.TIMEOUT),
            )
