"""The command `gnws` is the scripts, and helps without waiting for PyTorch."""

import argparse
import importlib
import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser

from gnws_d2.engine.benchmark import MODELS
from gnws_tools import gnws
from gnws_tools.arguments import train_argument_parser
from gnws_tools.benchmark import argument_parser as benchmark_argument_parser

HELP = """
import sys, time
sys.argv = ["gnws", *{args}]
start = time.perf_counter()
from gnws_tools.gnws import main
try:
    main()
finally:
    seconds = time.perf_counter() - start
    assert "torch" not in sys.modules and seconds < 2, seconds
"""


def run(*args):
    code = [sys.executable, "-c", HELP.format(args=args)]
    return subprocess.run(code, capture_output=True, text=True)


@pytest.mark.parametrize("command", [None, *gnws.COMMANDS])
def test_help_needs_no_pytorch(command):
    done = run(*filter(None, [command]), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: gnws {command or '[-h]'}")


def test_every_command_is_listed_with_what_it_is_for():
    done = run("--help")
    for command, (_, what) in gnws.COMMANDS.items():
        assert any(line.split() == [command, *what.split()] for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "gnws: error: the following arguments are required: COMMAND"),
        (["trian"], "gnws: error: argument COMMAND: invalid choice: 'trian'"),
        (["train", "--num-gpus", "two"], "gnws train: error: argument --num-gpus: invalid int"),
        (["convert"], "gnws convert: error: the following arguments are required: IN, OUT"),
    ],
)
def test_mistakes_are_told_at_once_with_status_2(args, message):
    done = run(*args)
    assert done.returncode == 2
    assert message in done.stderr


def test_train_and_eval_are_train_net(monkeypatch):
    called = []
    train_net = importlib.import_module("gnws_tools.train_net")
    monkeypatch.setattr(train_net, "get_config", called.append)
    monkeypatch.setattr(train_net, "check_setup", lambda *_: None)
    monkeypatch.setattr(train_net, "launch", lambda *_: None)
    for command in ("train", "eval"):
        monkeypatch.setattr(sys, "argv", ["gnws", command, "--config-file", "a.yaml", "SEED", "1"])
        gnws.main()
    train, evaluate = called
    assert not train.eval_only and evaluate.eval_only
    assert train.config_file == evaluate.config_file == "a.yaml"
    assert train.opts == evaluate.opts == ["SEED", "1"]


def options(parser):
    return {
        tuple(action.option_strings) or action.dest: (action.dest, action.type, action.nargs)
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    }


def test_options_are_detectron2s():
    """They are written again in this project, because Detectron2's need PyTorch."""
    ours, detectron2s = options(train_argument_parser()), options(default_argument_parser())
    assert ours.pop(("--dataset",)) and ours == detectron2s
    words = ["--resume", "--eval-only", "--num-gpus", "2", "--num-machines", "3"]
    words += ["--machine-rank", "1", "--dist-url", "u", "--config-file", "f", "SEED", "1"]
    ours, detectron2s = (
        vars(parser.parse_args(words))
        for parser in (train_argument_parser(), default_argument_parser())
    )
    assert ours.pop("dataset") == [] and ours == detectron2s
    ours, detectron2s = (
        vars(parser.parse_args([]))
        for parser in (train_argument_parser(), default_argument_parser())
    )
    assert ours.pop("dataset") == [] and ours.pop("dist_url") == "auto"
    del detectron2s["dist_url"]
    assert ours == detectron2s


def test_help_names_the_models_of_a_benchmark():
    text = " ".join(benchmark_argument_parser().format_help().split())
    assert "; ".join(MODELS) in text
