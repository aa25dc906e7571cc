"""The wheel works without a clone, in a separate environment and from any directory."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, TINY

SMALL = [*TINY, "MODEL.DEVICE", "cpu", "SOLVER.REFERENCE_WORLD_SIZE", "0"]
SMALL += ["DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("wheel")
    checkout = tmp_path / "checkout"
    for name in ("gnws_d2", "tools", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(checkout)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def test_wheel_carries_configs_and_table_and_commands(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "configs").iterdir():
        assert f"gnws_d2/model_zoo/configs/{path.name}" in shipped
    for path in (ROOT / "tools").glob("*.py"):
        assert f"gnws_tools/{path.name}" in shipped
    for path in (ROOT / "gnws_d2").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in shipped


@pytest.mark.ci
def test_wheel_predicts_trains_and_evaluates_elsewhere(wheel, photographs, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    bin = tmp_path / "env" / "bin"
    site_packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
    # What this test's own environment has, without a copy of it and without this project.
    Path(site_packages, "installed.pth").write_text(sysconfig.get_path("purelib"))
    work = tmp_path / "work"
    work.mkdir()

    def run(*command):
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(bin / command[0]), *command[1:]], cwd=work, env=environ, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ["python", "-m", "pip", "install", "-q", "--no-index"]
    run(*pip, "--ignore-installed", "--no-deps", wheel)
    assert run("gnws", "--version").strip() == wheel.name.split("-")[1]
    model = ["--config-file", "quick_start"]
    data = ["--dataset", "fruits", str(photographs.json_file), str(photographs.images)]
    keys = ["DATASETS.TRAIN", "('fruits',)", "DATASETS.TEST", "('fruits',)", *SMALL]
    keys += ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "OUTPUT_DIR", "output"]
    run("gnws", "train", "--num-gpus", "2", *model, *data, *keys, "SOLVER.MAX_ITER", "2")
    run("gnws", "eval", *model, *data, *keys, "MODEL.WEIGHTS", "output/model_final.pth")
    assert json.loads((work / "output/inference/coco_instances_results.json").read_text())
    photograph = str(next(photographs.images.iterdir()))
    weights = ["MODEL.WEIGHTS", "output/model_final.pth"]
    run("gnws", "demo", *model, *data, "--input", photograph, "--output", "found",
        "--confidence-threshold", "0", "--opts", *keys, *weights)  # fmt: skip
    assert json.loads((work / "found" / "detections.json").read_text())["annotations"]
    run("gnws", "report", "output", *data)
    assert "fruits" in (work / "output" / "report.html").read_text()
    run("gnws", "convert", "output/model_final.pth", "mmdet.pth", "--to", "mmdet")
    assert (work / "mmdet.pth").is_file()
