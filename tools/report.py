#!/usr/bin/env python3
"""Write one HTML page about a run of train_net.py, RUN_DIR/report.html, and print its AP."""

import argparse

from gnws_tools.arguments import add_dataset_argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="OUTPUT_DIR of the run")
    add_dataset_argument(parser)
    args = parser.parse_args()
    # Imported late, so that --help does not wait for PyTorch.
    from detectron2.utils.logger import setup_logger

    from gnws_d2.utils.errors import UserError, exit_on_user_error

    @exit_on_user_error
    def run() -> None:
        try:
            from gnws_d2.report import make_report
        except ModuleNotFoundError as e:
            raise UserError(f"{e.name} is not installed: pip install 'gnws_d2[report]'") from e
        make_report(args.run_dir, args.dataset)

    setup_logger(name="gnws_d2")
    run()


if __name__ == "__main__":
    main()
