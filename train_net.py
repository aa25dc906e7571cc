#!/usr/bin/env python3
"""
Train and evaluate GN+WS detectors. This is Detectron2's training script, with `--dataset` for data
of one's own and checks before work.
"""

import argparse

import gnws_d2  # noqa: F401  (registers the models and the built-in data)
from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.engine import Trainer, check_setup, default_setup, get_config, launch
from gnws_d2.utils.errors import exit_on_user_error
from gnws_tools.arguments import train_argument_parser


def main(args: argparse.Namespace) -> dict | None:
    cfg = get_config(args)
    default_setup(cfg, args)

    if args.eval_only:
        model = Trainer.build_model(cfg)
        GNWSCheckpointer(model, cfg.OUTPUT_DIR, strict=True).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        return Trainer.test(cfg, model)

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


@exit_on_user_error
def invoke_main() -> None:
    args = train_argument_parser().parse_args()
    cfg = get_config(args)
    check_setup(cfg, args)
    launch(main, cfg, args)


if __name__ == "__main__":
    invoke_main()
