"""The command `gnws` runs the scripts, and prints help without importing PyTorch."""

import argparse
import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser

from gnws_d2.engine import train_net
from gnws_tools.benchmark import MODELS
from gnws_tools.benchmark import argument_parser as benchmark_argument_parser
from gnws_tools.cli import COMMANDS, add_train_arguments, main

HELP = """
import sys, time
sys.argv = ["gnws", *{args}]
start = time.perf_counter()
from gnws_tools.cli import main
try:
    main()
finally:
    seconds = time.perf_counter() - start
    assert "torch" not in sys.modules and seconds < 2, seconds
"""


def run(*args):
    code = [sys.executable, "-c", HELP.format(args=args)]
    return subprocess.run(code, capture_output=True, text=True)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_needs_no_pytorch(command):
    done = run(*filter(None, [command]), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: gnws {command or '[-h]'}")


def test_every_command_is_listed_with_its_description():
    done = run("--help")
    for command, (_, text) in COMMANDS.items():
        assert any(line.split() == [command, *text.split()] for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "gnws: error: the following arguments are required: COMMAND"),
        (["trian"], "gnws: error: argument COMMAND: invalid choice: 'trian'"),
        (["train", "--num-gpus", "two"], "gnws train: error: argument --num-gpus: invalid int"),
        (["train", "--config-file", "gone.yaml"], "train: error: --config-file gone.yaml does not"),
        (
            ["eval", "--dataset", "a", "gone.json", "."],
            "eval: error: --dataset a: gone.json does not",
        ),
        (["finetune", "--data", "gone", "--output", "x"], "finetune: error: --data gone does not"),
        (
            "export --config-file a --format folded --int8 --images b --output c".split(),
            "gnws export: error: --int8 needs --format onnx, not folded",
        ),
        (["convert"], "gnws convert: error: the following arguments are required: IN, OUT"),
    ],
)
def test_mistakes_end_at_once_with_status_2(args, message):
    done = run(*args)
    assert done.returncode == 2
    assert message in done.stderr


def test_train_and_eval_are_train_net(monkeypatch):
    called = []
    monkeypatch.setattr(train_net, "separate_evaluation", lambda args: None)
    monkeypatch.setattr(train_net, "get_config", called.append)
    monkeypatch.setattr(train_net, "check_setup", lambda *_: sys.exit(7))
    for command in ("train", "eval"):
        monkeypatch.setattr(
            sys, "argv", ["gnws", command, "--config-file", "quick_start", "SEED", "1"]
        )
        with pytest.raises(SystemExit) as e:
            main()
        assert e.value.code == 7
    train, evaluate = called
    assert not train.eval_only and evaluate.eval_only
    assert train.config_file == evaluate.config_file == "quick_start"
    assert train.opts == evaluate.opts == ["SEED", "1"]


def train_argument_parser():
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    return parser


def options(parser):
    return {
        tuple(action.option_strings) or action.dest: (action.dest, action.type, action.nargs)
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    }


def test_options_are_detectron2s():
    """They are copied, because importing Detectron2's parser imports PyTorch."""
    own, detectron2s = options(train_argument_parser()), options(default_argument_parser())
    assert own.pop(("--dataset",)) and own == detectron2s
    words = ["--resume", "--eval-only", "--num-gpus", "2", "--num-machines", "3"]
    words += ["--machine-rank", "1", "--dist-url", "u", "--config-file", "f", "SEED", "1"]
    own, detectron2s = (
        vars(parser.parse_args(words))
        for parser in (train_argument_parser(), default_argument_parser())
    )
    assert own.pop("dataset") == [] and own == detectron2s
    own, detectron2s = (
        vars(parser.parse_args([]))
        for parser in (train_argument_parser(), default_argument_parser())
    )
    assert own.pop("dataset") == [] and own.pop("dist_url") == "auto"
    del detectron2s["dist_url"]
    assert own == detectron2s


def test_help_names_the_models_of_a_benchmark():
    text = " ".join(benchmark_argument_parser().format_help().split())
    assert "; ".join(MODELS) in text
