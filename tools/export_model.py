#!/usr/bin/env python3
"""
Export a trained model: folded (plain GN, for stock Detectron2), TorchScript or ONNX. If it does not
give the same detections on the images, or loses AP in int8, the exit status is 1 and nothing is
written.
"""

import argparse
import contextlib

from gnws_tools.arguments import add_dataset_argument


def _points(text: str) -> float:
    with contextlib.suppress(ValueError):
        points = float(text)
        if points >= 0:  # not NaN
            return points
    raise argparse.ArgumentTypeError(f"{text} is not a number of points, 0 or more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--format", required=True, choices=["folded", "torchscript", "onnx"])
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the files")
    text = "image with objects that the model knows, or a directory, for its first five"
    parser.add_argument("--images", required=True, metavar="PATH", help=text)
    text = (
        "quantize convolutions to int8, calibrated on up to 100 of the images, and show AP before "
    )
    text += "and after on the first dataset of DATASETS.TEST"
    parser.add_argument("--int8", action="store_true", help=text)
    text = "refuse an int8 model with an AP that falls by more points (default: 1)"
    parser.add_argument("--max-drop", type=_points, metavar="POINTS", help=text)
    add_dataset_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    if args.int8 and args.format != "onnx":
        parser.error(f"--int8 needs --format onnx, not {args.format}")
    if args.max_drop is not None and not args.int8:
        parser.error("--max-drop needs --int8")
    max_drop = (1.0 if args.max_drop is None else args.max_drop) if args.int8 else None
    # Imported late so that --help does not wait for PyTorch.
    from detectron2.utils.logger import setup_logger

    from gnws_d2.config import choose_device, load_config
    from gnws_d2.data import register_coco_datasets
    from gnws_d2.export import export_model
    from gnws_d2.utils.errors import exit_on_user_error

    @exit_on_user_error
    def export() -> None:
        cfg = load_config(args.config_file, args.opts, args.dataset)
        register_coco_datasets(cfg.DATASETS.COCO)
        choose_device(cfg)
        export_model(cfg, args.format, args.output, args.images, max_drop)

    setup_logger(name="gnws_d2")
    setup_logger(name="detectron2.evaluation.evaluator")  # the progress of an evaluation
    export()


if __name__ == "__main__":
    main()
