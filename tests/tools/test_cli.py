"""The commands of `gnws`, whose help does not wait for PyTorch."""

import argparse
import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser

from gnws_d2.engine import train_net
from gnws_tools.cli import COMMANDS, add_train_arguments

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
def test_help_is_printed_without_importing_pytorch(command):
    done = run(*filter(None, [command]), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: gnws {command or '[-h]'}")
    assert command or all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "gnws: error: the following arguments are required: COMMAND"),
        (["trian"], "gnws: error: argument COMMAND: invalid choice: 'trian'"),
        (["train", "--num-gpus", "two"], "gnws train: error: argument --num-gpus: invalid int"),
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


@pytest.mark.parametrize("command, eval_only", [("train", False), ("eval", True)])
def test_train_and_eval_are_train_net(monkeypatch, gnws, command, eval_only):
    jobs = []
    monkeypatch.setattr(train_net, "run", jobs.append)
    gnws(command, "--config-file", "quick_start", "OUTPUT_DIR", "new")
    assert [job.eval_only for job in jobs] == [eval_only]
    assert jobs[0].opts == ["OUTPUT_DIR", "new"]


def parse(parser, *words):
    return vars(parser.parse_args(words))


def test_options_are_detectron2s():
    """They are copied, because importing Detectron2's parser imports PyTorch."""
    own, detectron2s = argparse.ArgumentParser(), default_argument_parser()
    add_train_arguments(own)
    words = ["--resume", "--eval-only", "--num-gpus", "2", "--num-machines", "3"]
    words += ["--machine-rank", "1", "--dist-url", "u", "--config-file", "f", "SEED", "1"]
    assert parse(own, *words) == {**parse(detectron2s, *words), "dataset": []}
    assert parse(own) == {**parse(detectron2s), "dataset": [], "dist_url": "auto"}
