#!/usr/bin/env python3
"""
Detect objects in images or a video: draw them, and write them as COCO JSON. This is Detectron2's
demo, with `--model` for trained models. The exit status is 1 if an input cannot be read.
"""

import argparse
import sys

from gnws_tools.arguments import add_dataset_argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE", help="config of the model")
    text = "trained model: OUTPUT_DIR of a run, a checkpoint in it, or name of a published model"
    model.add_argument("--model", metavar="MODEL", help=text)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, directories, patterns")
    source.add_argument("--video-input", metavar="FILE", help="video file")
    source.add_argument("--webcam", action="store_true", help="show what the webcam sees")
    text = (
        "directory for the drawings and detections.json, or file for a single drawing, with the "
        "JSON beside it (default: show a window; any key for the next image, Esc to quit)"
    )
    parser.add_argument("--output", metavar="PATH", help=text)
    text = "minimum score of a detection, from 0 to 1 (default: 0.5)"
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, metavar="SCORE", help=text
    )
    parser.add_argument("--no-labels", action="store_true", help="draw no names and scores")
    parser.add_argument(
        "--no-boxes", action="store_true", help="draw masks alone, if there are any"
    )
    add_dataset_argument(parser)
    text = "config KEY VALUE pairs, at the end"
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help=text)
    args = parser.parse_args()
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold {args.confidence_threshold} is not from 0 to 1")
    if args.webcam and args.output:
        parser.error("--webcam only shows a window: leave --output out")
    # Imported late so that --help does not wait for PyTorch.
    from gnws_d2.utils.errors import exit_on_user_error
    from gnws_tools.visualization_demo import run_demo

    sys.exit(exit_on_user_error(run_demo)(args))


if __name__ == "__main__":
    main()
