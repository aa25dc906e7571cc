#!/usr/bin/env python3
"""Convert a checkpoint to Detectron2's format, or from there to MMDetection's."""

import argparse


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", metavar="IN", help="a file of any known format")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--to", choices=["detectron2", "mmdet"], default="detectron2", help="format of OUT"
    )
    return parser


def convert(args: argparse.Namespace) -> None:
    from gnws_d2.checkpoint import convert_to_mmdet, load_checkpoint, save_checkpoint
    from gnws_d2.utils.errors import UserError

    checkpoint = load_checkpoint(args.input)
    if args.to == "mmdet":
        try:
            checkpoint = convert_to_mmdet(checkpoint)
        except UserError as e:
            raise UserError(f"The checkpoint {args.input} cannot be converted: {e}") from e
    save_checkpoint(checkpoint, args.output)


def main() -> None:
    args = argument_parser().parse_args()
    # Not before, so that --help does not wait for PyTorch.
    from gnws_d2.utils.errors import exit_on_user_error

    exit_on_user_error(convert)(args)


if __name__ == "__main__":
    main()
