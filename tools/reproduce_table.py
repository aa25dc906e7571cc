#!/usr/bin/env python3
"""
Evaluate the published weights and compare with the published AP. The exit status is 1 if a measured
AP is off by more than 0.1.
"""

import argparse
import json
import os
import sys
from typing import Any

import cli  # noqa: F401  (before Detectron2, whose warnings it filters)

# isort: split
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from gnws_d2 import model_zoo
from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.config import check_device, load_config
from gnws_d2.data import check_datasets, register_coco_datasets
from gnws_d2.engine import Trainer
from gnws_d2.utils.errors import UserError, exit_on_user_error
from gnws_d2.utils.files import atomic_write
from gnws_d2.utils.process import keep_freed_memory

TOLERANCE = 0.1  # AP, in percent: the published figures have one digit


def reproduce_row(name: str, opts: list[str]) -> dict[str, Any]:
    """
    Evaluate the published weights of a model of the zoo, with KEY VALUE pairs for its config.

    Returns:
        ``name``, the published and the measured AP and their difference in percent for boxes and
        masks, and ``result``: "ok", "off by ...", or why weights or data are missing.
    """
    (published,) = (row for row in model_zoo.table() if row["name"] == name)
    row: dict[str, Any] = {"name": name}
    weights = ["MODEL.WEIGHTS", model_zoo.get_checkpoint_url(name)]
    cfg = load_config(model_zoo.get_config_file(name), [*weights, *opts])
    check_device(cfg)
    try:
        check_datasets(cfg, ("TEST",))
        model = Trainer.build_model(cfg)
        GNWSCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS)
    except UserError as e:
        return {**row, "result": str(e)}
    results = Trainer.test(cfg, model)
    row["result"] = "ok"
    for task, column in (("bbox", "box"), ("segm", "mask")):
        if (ap := published[f"{column}_ap"]) is not None:
            difference = results[task]["AP"] - ap
            row[f"{column} AP published"], row[f"{column} AP"] = ap, results[task]["AP"]
            row[f"{column} difference"] = difference
            if not abs(difference) <= TOLERANCE + 1e-9:  # or NaN
                row["result"] = f"off by > {TOLERANCE}"
    return row


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=model_zoo.names(), metavar="NAME", help="default: all")
    text = "registered dataset, or NAME ANNOTATIONS.json IMAGE_ROOT (default: coco_2017_val)"
    add("--dataset", nargs="+", default=["coco_2017_val"], metavar="NAME", help=text)
    add("--output", default="output/table", metavar="DIR", help="for table.md and table.json")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="such as MODEL.DEVICE cpu")
    args = parser.parse_args()
    if len(args.dataset) not in (1, 3):
        raise UserError("--dataset takes NAME, or NAME ANNOTATIONS.json IMAGE_ROOT.")
    if unknown := set(args.models) - set(model_zoo.names()):
        names = ", ".join(model_zoo.names())
        raise UserError(f"--models {' '.join(unknown)}: the models are {names}.")
    register_coco_datasets([args.dataset] if len(args.dataset) == 3 else [])
    setup_logger()
    keep_freed_memory()

    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as e:
        raise UserError(f"Cannot write to --output {args.output}: {e.strerror}.") from e
    rows = []
    for name in args.models:
        output = os.path.join(args.output, name)
        opts = ["DATASETS.TEST", f"({args.dataset[0]!r},)", "OUTPUT_DIR", output, *args.opts]
        rows.append(reproduce_row(name, opts))
        with atomic_write(os.path.join(args.output, "table.json")) as f:
            json.dump(rows, f, indent=1)
        table = tabulate(rows, "keys", "github", floatfmt=".2f")
        with atomic_write(os.path.join(args.output, "table.md")) as f:
            f.write(f"{table}\n")
    print(table)
    sys.exit(1 if any(row["result"].startswith("off by") for row in rows) else 0)


if __name__ == "__main__":
    main()
