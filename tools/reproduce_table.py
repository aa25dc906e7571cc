#!/usr/bin/env python3
"""
Evaluate the published weights of the models, and compare with the published AP. The exit status is
1 if a measured AP is off by more than 0.1.
"""

import argparse
import json
import os
import sys

from detectron2.utils.logger import setup_logger

import gnws_d2  # noqa: F401  (registers the models and the built-in data)
from gnws_d2 import model_zoo
from gnws_d2.data import register_coco_datasets
from gnws_d2.engine.reproduce import format_table, is_reproduced, reproduce_row
from gnws_d2.utils.errors import UserError, exit_on_user_error
from gnws_d2.utils.files import replace_file


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=model_zoo.names(), metavar="NAME", help="default: all twelve"
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=["coco_2017_val"],
        metavar="NAME",
        help="a registered dataset, or NAME ANNOTATIONS.json IMAGE_ROOT of one's own "
        "(default: coco_2017_val)",
    )
    parser.add_argument(
        "--output", default="output/table", metavar="DIR", help="for table.md and table.json"
    )
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="as MODEL.DEVICE cpu"
    )
    args = parser.parse_args()
    if len(args.dataset) not in (1, 3):
        raise UserError("--dataset takes NAME, or NAME ANNOTATIONS.json IMAGE_ROOT.")
    if unknown := set(args.models) - set(model_zoo.names()):
        raise UserError(
            f"--models {' '.join(unknown)}: the models are {', '.join(model_zoo.names())}."
        )
    register_coco_datasets([args.dataset] if len(args.dataset) == 3 else [])
    setup_logger()

    rows = []
    os.makedirs(args.output, exist_ok=True)
    for name in args.models:
        output = os.path.join(args.output, name)
        rows.append(reproduce_row(name, args.dataset[0], args.opts, output))
        for file_name, text in (
            ("table.md", format_table(rows) + "\n"),
            ("table.json", json.dumps(rows, indent=1) + "\n"),
        ):
            path = os.path.join(args.output, file_name)
            with replace_file(path) as f:
                f.write(text)
    print(format_table(rows))
    sys.exit(0 if all(map(is_reproduced, rows)) else 1)


if __name__ == "__main__":
    main()
