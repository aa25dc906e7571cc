#!/usr/bin/env python3
"""
Train and evaluate GN+WS detectors: Detectron2's training script, with `--dataset` for your own data
and checks before work starts.
"""

import argparse
from datetime import timedelta

from gnws_tools.arguments import train_argument_parser

# isort: split
from detectron2.engine import launch
from torch import distributed as dist

import gnws_d2  # noqa: F401  (registers the models and the built-in data)
from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.data.coco import dataset_classes
from gnws_d2.engine import (
    Trainer,
    check_setup,
    default_setup,
    get_config,
    join_torchrun,
    lock_output_dir,
    supervise,
)
from gnws_d2.utils.errors import exit_on_user_error


def main(args: argparse.Namespace) -> dict | None:
    cfg = get_config(args)
    default_setup(cfg, args)

    if args.eval_only and cfg.TEST.PREDICTIONS:
        return Trainer.test_predictions(cfg)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        classes = dataset_classes(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
        checkpointer = GNWSCheckpointer(model, cfg.OUTPUT_DIR, strict=True, classes=classes)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)

    trainer = Trainer(cfg, args.config_file, getattr(args, "choices", ()))
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args: argparse.Namespace) -> None:
    """Check a job, and launch :func:`main`."""
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


@exit_on_user_error
def invoke_main() -> None:
    run(train_argument_parser().parse_args())


if __name__ == "__main__":
    invoke_main()
