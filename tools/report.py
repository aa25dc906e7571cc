#!/usr/bin/env python3
"""
Write one HTML page of a run of train_net.py, RUN_DIR/report.html, and print its AP; or of two runs
beside each other, RUN_A/compare.html.
"""

import argparse

from gnws_tools.arguments import add_dataset_argument


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="OUTPUT_DIR of the run")
    which.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="two of them")
    add_dataset_argument(parser)
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    # Not before, so that --help does not wait for PyTorch.
    from detectron2.utils.logger import setup_logger

    from gnws_d2.engine.report import make_report
    from gnws_d2.utils.errors import exit_on_user_error

    setup_logger(name="gnws_d2")
    exit_on_user_error(make_report)(args.compare or [args.run_dir], args.dataset)


if __name__ == "__main__":
    main()
