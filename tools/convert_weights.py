#!/usr/bin/env python3
"""Convert a checkpoint to Detectron2's format, or from there to MMDetection's."""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", metavar="IN", help="a checkpoint of any known format")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--to", choices=["detectron2", "mmdet"], default="detectron2", help="format of OUT"
    )
    args = parser.parse_args()
    # Imported after parsing, so that --help does not wait for PyTorch.
    from gnws_d2.checkpoint import convert_to_mmdet, load_checkpoint, save_checkpoint
    from gnws_d2.utils.errors import exit_on_user_error

    @exit_on_user_error
    def convert() -> None:
        checkpoint = load_checkpoint(args.input)
        if args.to == "mmdet":
            checkpoint = convert_to_mmdet(checkpoint)
        save_checkpoint(checkpoint, args.output)

    convert()


if __name__ == "__main__":
    main()
