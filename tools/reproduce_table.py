#!/usr/bin/env python3
"""
Evaluate the published weights on COCO val2017 by train_net.py, and compare with the published AP.
Each model has its log in output/table/NAME. The exit status is 1 if an AP differs by more than 0.1,
or a model could not be evaluated.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import cli  # noqa: F401  (before gnws_d2, which it finds)

# isort: split
from gnws_d2 import model_zoo

TOLERANCE = 0.1  # AP, in percent: the published figures have one digit
TRAIN_NET = str(Path(__file__).parent.parent / "train_net.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add, names = parser.add_argument, model_zoo.names()
    add("--models", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    add("--num-gpus", default="1", metavar="N", help="as for train_net.py")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs")
    args = parser.parse_args()
    failed = []
    for row in model_zoo.table():
        name = row["name"]
        if name not in args.models:
            continue
        published = {"bbox": row["box_ap"], "segm": row["mask_ap"]}
        expected = [[k, "AP", ap, TOLERANCE] for k, ap in published.items() if ap is not None]
        command = [sys.executable, TRAIN_NET, "--config-file", name, "--num-gpus", args.num_gpus]
        keys = ["MODEL.WEIGHTS", model_zoo.get_checkpoint_url(name)]
        keys += ["TEST.EXPECTED_RESULTS", str(expected)]
        keys += ["OUTPUT_DIR", os.path.join("output", "table", name), *args.opts]
        if subprocess.run([*command, "--eval-only", *keys]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"Not reproduced: {', '.join(failed)}. The reasons are above and in output/table.")


if __name__ == "__main__":
    main()
