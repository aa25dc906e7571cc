#!/usr/bin/env python3
"""Fold the weight standardization of a trained model into its weights, for stock Detectron2."""

import argparse

import gnws_d2  # noqa: F401  (registers the models)
from gnws_d2.checkpoint import fold_model
from gnws_d2.engine import load_config
from gnws_d2.utils.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as MODEL.WEIGHTS FILE"
    )
    args = parser.parse_args()
    for path in fold_model(load_config(args.config_file, args.opts), args.output):
        print(path)


if __name__ == "__main__":
    main()
