"""The command `gnws`: the scripts by one name, from any directory."""

import argparse
import importlib
import importlib.metadata
import sys

from .arguments import train_argument_parser

# The script of each command, and what it is for.
COMMANDS = {
    "train": ("train_net", "train a model, and evaluate it"),
    "eval": ("train_net", "evaluate a model: AP on a dataset"),
    "demo": ("demo", "draw what a model finds in images or a video"),
    "report": ("report", "write a page about a run"),
    "convert": ("convert_weights", "convert a checkpoint from or to MMDetection's format"),
    "export": ("export_model", "write a model as plain GN, TorchScript or ONNX"),
    "check-dataset": ("check_dataset", "list every fault of a dataset"),
    "benchmark": ("benchmark", "measure speed and memory"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gnws",
        description="GN+WS detectors for Detectron2.",
        epilog="commands:\n"
        + "".join(f"  {name:15}{what}\n" for name, (_, what) in COMMANDS.items())
        + "\n`gnws COMMAND --help` tells more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=importlib.metadata.version("gnws_d2")
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    args = parser.parse_args()
    script, _ = COMMANDS[args.command]
    sys.argv = [f"gnws {args.command}", *args.arguments]
    if script == "train_net":
        if args.command == "eval":
            sys.argv.insert(1, "--eval-only")
        train_argument_parser().parse_args()  # --help, and mistakes, before PyTorch is loaded
        importlib.import_module(".train_net", __package__).invoke_main()
    else:
        importlib.import_module(f".{script}", __package__).main()
