#!/usr/bin/env python3
"""
Measure GN+WS beside plain GN, frozen BatchNorm and the reference formula, in turns in one process.

ops: weight standardization and GroupNorm + ReLU alone. inference, train: whole models, in float32
and mixed precision. dataloader: the mappers. Writes a table in Markdown, JSON and a bar chart.
"""

import argparse

from gnws_tools.arguments import add_dataset_argument


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=["ops", "inference", "train", "dataloader"])
    parser.add_argument("--config-file", default="mask_rcnn_R50_gnws_2x", metavar="FILE")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="of inference and train: GN+WS; GN; GN+WS, reference; GN, Detectron2; FrozenBN; and "
        "each with ', AMP' after it (default: all)",
    )
    parser.add_argument("--image-size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, help="default: 1 for inference, 2 for training")
    parser.add_argument("--turns", type=int, default=3, help="of each variant (default: 3)")
    parser.add_argument("--runs", type=int, default=1, help="timed in a turn (default: 1)")
    parser.add_argument("--output", default="output/benchmark", metavar="DIR")
    add_dataset_argument(parser)
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="as MODEL.DEVICE cpu"
    )
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    # Not before, so that --help does not wait for PyTorch.
    from gnws_d2.engine.benchmark_tables import run_benchmark
    from gnws_d2.utils.errors import exit_on_user_error

    exit_on_user_error(run_benchmark)(args)


if __name__ == "__main__":
    main()
