#!/usr/bin/env python3
"""
Find objects in images or in a video: draw them, and write them as COCO JSON. This is Detectron2's
demo, with `--model` for the published models. The exit status is 1 if an input cannot be read.
"""

import argparse
import sys

from gnws_tools.arguments import add_dataset_argument

EXAMPLES = """
examples:
  demo.py --model mask_rcnn_R50_gnws_2x --input photos --output found
  demo.py --config-file configs/quick_start.yaml --input '*.png' --output found \\
      --opts MODEL.WEIGHTS output/quick_start/model_final.pth
  demo.py --model mask_rcnn_R50_gnws_2x --video-input street.mp4 --output found
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE", help="config of the model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="a published model, as mask_rcnn_R50_gnws_2x, with its weights (gnws://NAME) unless "
        "--opts has MODEL.WEIGHTS",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="images, directories of images, or patterns such as 'photos/*.jpg'",
    )
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="show what the webcam sees")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a directory for the pictures or the video, and detections.json; or, for a single "
        "input, the file to write, beside which the JSON goes (default: show them in a window, "
        "any key for the next, Esc to end)",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="the least score of an object, from 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images at once, if they follow one another and are of one size (default: 4 on a "
        "GPU, 1 on a CPU)",
    )
    add_dataset_argument(parser)
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="config keys and values, as MODEL.WEIGHTS FILE or MODEL.DEVICE cpu; must come last",
    )
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    # Not before, so that --help does not wait for PyTorch.
    from gnws_d2.engine.demo import run_demo
    from gnws_d2.utils.errors import exit_on_user_error

    sys.exit(exit_on_user_error(run_demo)(args))


if __name__ == "__main__":
    main()
