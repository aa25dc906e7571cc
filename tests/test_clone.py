"""The scripts run in a clone, beside a Detectron2 that is installed, without ``pip install``."""

import os
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT, TINY, launches_on_cpu

SCRIPTS = ("finetune", "demo", "report", "convert_weights", "export_model")
ONE_STEP = [
    *TINY, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "1", "SOLVER.REFERENCE_WORLD_SIZE", "0",
    "MODEL.ROI_HEADS.NUM_CLASSES", "3", "OUTPUT_DIR", "output",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Run Python elsewhere, without the .pth files, by which this project is installed."""

    def run(*args):
        environ = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
        command = [sys.executable, "-S", *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)

    return run


def test_only_detectron2_is_installed(run):
    for name in ("gnws_d2", "gnws_tools", "cli"):
        assert f"No module named '{name}'" in run("-c", f"import {name}").stderr
    assert run("-c", "import detectron2").returncode == 0


@pytest.mark.parametrize("script", [*SCRIPTS, "benchmark", "reproduce_table"])
def test_script_begins(run, script):
    done = run(ROOT / "tools" / f"{script}.py", "--help")
    assert done.returncode == 0 and f"usage: {script}.py" in done.stdout, done.stderr


@launches_on_cpu
def test_processes_train_and_a_tool_reads_the_run(run, photographs, tmp_path):
    data = ["--dataset", "fruits", photographs.json_file, photographs.images]
    model = ["--num-gpus", "2", "--config-file", "configs/quick_start.yaml"]
    names = ["DATASETS.TRAIN", "('fruits',)", "DATASETS.TEST", "()"]
    done = run(ROOT / "train_net.py", *model, *data, *ONE_STEP, *names)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "output" / "model_final.pth"
    done = run(ROOT / "tools" / "convert_weights.py", checkpoint, "converted.pth")
    assert done.returncode == 0 and (tmp_path / "converted.pth").is_file(), done.stderr
