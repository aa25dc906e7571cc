#!/usr/bin/env python3
"""List the issues of a dataset in COCO format. The exit status is 1 if there are any."""

import argparse
import json
import os
import sys
from collections import defaultdict

SHOWN = 10  # of each kind


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="the JSON file")
    parser.add_argument("images", metavar="IMAGES", help="the directory of the images")
    parser.add_argument("--no-images", action="store_true", help="do not open the images")
    parser.add_argument("--output", metavar="FILE.json", help="file to write all issues to")
    return parser


def check(args: argparse.Namespace) -> None:
    from gnws_d2.data.check import Issue, check_dataset
    from gnws_d2.utils.errors import UserError
    from gnws_d2.utils.files import atomic_write

    for path in (args.images, os.path.dirname(os.path.abspath(args.output or ""))):
        if not os.path.isdir(path):
            raise UserError(f"The directory {path} does not exist.")
    issues = check_dataset(args.annotations, args.images, open_images=not args.no_images)
    kinds: dict[str, list[Issue]] = defaultdict(list)
    for issue in issues:
        kinds[f"{issue.level}: {issue.kind}"].append(issue)
    for kind, found in sorted(kinds.items()):
        print(f"{kind} ({len(found)})", *(f"  {i.message}" for i in found[:SHOWN]), sep="\n")
        if len(found) > SHOWN:
            print(f"  and {len(found) - SHOWN} more")
    print(f"{args.annotations}: {len(issues)} issues")
    if args.output:
        report = {"annotations": args.annotations, "images": args.images}
        report["counts"] = {kind: len(found) for kind, found in kinds.items()}
        with atomic_write(args.output) as f:
            json.dump({**report, "issues": [issue._asdict() for issue in issues]}, f, indent=1)
    sys.exit(1 if issues else 0)


def main() -> None:
    args = argument_parser().parse_args()
    from gnws_d2.utils.errors import exit_on_user_error  # here, as --help needs no PyTorch

    exit_on_user_error(check)(args)


if __name__ == "__main__":
    main()
