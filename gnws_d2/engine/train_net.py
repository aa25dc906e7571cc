"""A job of ``train_net.py``: check it, launch it, and train or evaluate in each process."""

import argparse
import os
from datetime import timedelta

from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import distributed as dist
from torch import nn

from ..checkpoint import GNWSCheckpointer
from ..data.coco import dataset_classes
from .checks import check_setup
from .defaults import Trainer
from .launch import join_torchrun, lock_output_dir, supervise
from .setup import default_setup, get_config


def main(args: argparse.Namespace) -> dict | None:
    """Train, or evaluate with ``--eval-only``, as one of the processes of a job."""
    cfg = get_config(args)
    default_setup(cfg, args)

    if args.eval_only:
        results = _evaluate(cfg, args)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg, args.config_file)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def _evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict:
    if cfg.TEST.PREDICTIONS:
        return Trainer.test_predictions(cfg)
    model = Trainer.build_model(cfg)
    classes = dataset_classes(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
    checkpointer = GNWSCheckpointer(model, cfg.OUTPUT_DIR, strict=True, classes=classes)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    return Trainer.test(cfg, model)


def separate_evaluation(args: argparse.Namespace) -> None:
    """
    Have ``--eval-only`` with the ``OUTPUT_DIR`` of a training write into its ``evaluation/``, so
    that the files of the training stay its own: change `args` to that.
    """
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
    """Check a job, by the options of ``train_net.py``, and launch :func:`main`."""
    cfg = get_config(args)
    check_setup(cfg, args)
    with lock_output_dir(cfg, args):
        if dist.is_torchelastic_launched():
            join_torchrun(cfg, args)
            main(args)
            return
        with supervise(cfg, args):
            launch(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
                timeout=timedelta(seconds=cfg.DISTRIBUTED.TIMEOUT),
            )
