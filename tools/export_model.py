#!/usr/bin/env python3
"""
Export a trained model: folded (plain GN, for stock Detectron2), TorchScript or ONNX. If it does not
give the same detections on the images, the exit status is 1 and nothing is written.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--format", required=True, choices=["folded", "torchscript", "onnx"])
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the files")
    text = "image with objects that the model knows, or a directory, for its first five"
    parser.add_argument("--images", required=True, metavar="PATH", help=text)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    # Imported late so that --help does not wait for PyTorch.
    from detectron2.utils.logger import setup_logger

    from gnws_d2.config import choose_device, load_config
    from gnws_d2.export import export_model
    from gnws_d2.utils.errors import exit_on_user_error

    @exit_on_user_error
    def export() -> None:
        cfg = load_config(args.config_file, args.opts)
        choose_device(cfg)
        export_model(cfg, args.format, args.output, args.images)

    setup_logger(name="gnws_d2")
    export()


if __name__ == "__main__":
    main()
