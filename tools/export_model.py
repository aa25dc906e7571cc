#!/usr/bin/env python3
"""
Write a trained model to files for other programs: a plain GN model for stock Detectron2 (folded), a
TorchScript file or an ONNX file. What is written must find the same objects on the images as the
model does; if not, the exit status is 1 and nothing is written.
"""

import argparse


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--format", required=True, choices=["folded", "torchscript", "onnx"])
    parser.add_argument("--output", required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--images",
        required=True,
        metavar="PATH",
        help="a photograph with objects that the model knows, to check with, or a directory of "
        "them, of which the first 5 are taken",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as MODEL.WEIGHTS FILE"
    )
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    # Not before, so that --help does not wait for PyTorch.
    from gnws_d2.engine import load_config
    from gnws_d2.engine.export import export_model, format_table
    from gnws_d2.utils.errors import exit_on_user_error

    @exit_on_user_error
    def export() -> None:
        cfg = load_config(args.config_file, args.opts)
        exported = export_model(cfg, args.format, args.output, args.images)
        print(format_table(exported))
        print(*exported.files, sep="\n")

    export()


if __name__ == "__main__":
    main()
