"""The command `gnws`, which runs the scripts from any directory."""

import argparse
import importlib
import sys
from importlib.metadata import version

from .arguments import check_files, train_argument_parser

# The script and the description of each command.
COMMANDS = {
    "train": ("train_net", "train a model and evaluate it"),
    "eval": ("train_net", "evaluate a model: AP on a dataset"),
    "finetune": ("finetune", "train a model on your own data, in any common format"),
    "demo": ("demo", "draw what a model detects in images or a video"),
    "report": ("report", "write an HTML page about a run"),
    "convert": ("convert_weights", "convert a checkpoint from or to MMDetection's format"),
    "export": ("export_model", "export a model as plain GN, TorchScript or ONNX"),
    "check-dataset": ("check_dataset", "list all problems of a dataset"),
    "benchmark": ("benchmark", "measure speed and memory"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gnws",
        description="GN+WS detectors for Detectron2.",
        epilog="commands:\n"
        + "".join(f"  {name:15}{text}\n" for name, (_, text) in COMMANDS.items())
        + "\n`gnws COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("gnws_d2"))
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    args = parser.parse_args()
    script, _ = COMMANDS[args.command]
    sys.argv = [f"gnws {args.command}", *args.arguments]
    if args.command == "eval":
        sys.argv.insert(1, "--eval-only")
    if script == "train_net":
        train_parser = train_argument_parser()  # --help and mistakes, before PyTorch is imported
        check_files(train_parser, train_parser.parse_args())
    module = importlib.import_module(f".{script}", __package__)
    getattr(module, "invoke_main", module.main)()
