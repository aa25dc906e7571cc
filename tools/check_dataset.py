#!/usr/bin/env python3
"""
List every fault of a dataset in COCO format. The exit status is 1 if there are any; images without
annotations are none.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from typing import Any

SHOWN = 10  # of each kind


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="the JSON file")
    parser.add_argument("images", metavar="IMAGES", help="the directory of the images")
    parser.add_argument("--no-images", action="store_true", help="do not open the images")
    parser.add_argument("--output", metavar="FILE.json", help="where to write all faults, too")
    return parser


def check(args: argparse.Namespace) -> None:
    from gnws_d2.data.check import check_dataset
    from gnws_d2.utils.errors import UserError
    from gnws_d2.utils.files import replace_file

    if not os.path.isdir(args.images):
        raise UserError(f"The image directory {args.images} does not exist.")
    if args.output and not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
        raise UserError(f"The directory of --output {args.output} does not exist.")
    kinds: dict[tuple[str, str], list[Any]] = defaultdict(list)
    found = check_dataset(args.annotations, args.images, open_images=not args.no_images)
    for fault in found:
        kinds[fault.level, fault.kind].append(fault)
    for (level, kind), faults in sorted(kinds.items()):
        print(f"{level}: {len(faults)} x {kind}")
        for fault in faults[:SHOWN]:
            print(f"  {fault.message}")
        if len(faults) > SHOWN:
            print(f"  and {len(faults) - SHOWN} more")
    total = sum(fault.level != "note" for fault in found)
    print(f"{args.annotations}: {total} faults")
    if args.output:
        report = {
            "annotations": args.annotations,
            "images": args.images,
            "counts": {f"{level}: {kind}": len(faults) for (level, kind), faults in kinds.items()},
            "faults": [fault._asdict() for fault in found],
        }
        try:
            with replace_file(args.output) as f:
                json.dump(report, f, indent=1)
        except OSError as e:
            raise UserError(f"Cannot write {args.output}: {e.strerror or e}.") from e
    sys.exit(1 if total else 0)


def main() -> None:
    args = argument_parser().parse_args()
    # Not before, so that --help does not wait for PyTorch.
    from gnws_d2.utils.errors import exit_on_user_error

    exit_on_user_error(check)(args)


if __name__ == "__main__":
    main()
