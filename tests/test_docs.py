"""
Every command and every piece of Python in the documentation runs, on small images and for one step.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from warm import WarmPython

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PROGRAMS = ("python ", "torchrun ", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ", "sbatch ")
# Run by .ci/run, and it itself with all tests.
CI_COMMANDS = ["bash tools/quick_start.sh", "bash tools/run_tests.sh"]
CI_COMMANDS += ["ruff check", "ruff format --check", "mypy"]
RUN_BY_CI = ["bash .ci/run", "pytest tests/layers/test_weight_standardization.py"]
# Each page begins with a model trained on COCO in output/, and one on own data.
TRAIN = "python train_net.py --config-file configs/mask_rcnn_R50_gnws_2x.yaml --num-gpus 1"
FINETUNE = (
    "python tools/finetune.py --train tests/assets/fruits_nuts/trainval.json "
    "tests/assets/fruits_nuts/images --model quick_start --epochs 60 --output output/fruits_nuts"
)
# These start Python themselves; the others are forked from one with Detectron2 (tests/warm.py).
STARTS_PROCESSES = ("--num-gpus 2", "tools/benchmark.py")
# Run by tests/tools.
OWN_TESTS = ("python tools/benchmark.py gpu",)
ON_CPUS = {"--num-gpus 8": "--num-gpus 2", "--nproc-per-node 8": "--nproc-per-node 2"}
# One machine alone; two of --num-machines run at the same time.
ON_ONE_MACHINE = {"--nnodes 2": "--nnodes 1", "HOST0:29500": "127.0.0.1:{port}"}
SLURM = {
    "sbatch": """
while [ "$1" != tools/slurm.sh ]; do shift; done
export SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=127.0.0.1 SLURM_NNODES=1 SLURM_GPUS_ON_NODE=2
exec bash "$@"
""",
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
""",
    "scontrol": 'echo "$3"',
}
# What is out of reach of a test, and stands for it.
OUT_OF_REACH = {
    "gnws://mask_rcnn_R50_gnws_2x": "output/model_final.pth",
    "python tools/reproduce_table.py": "python tools/reproduce_table.py --models "
    "mask_rcnn_R50_gnws_2x --opts MODEL.WEIGHTS output/model_final.pth",
}
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "10",
    # Narrow: checkpoints of 70 MB, not 500, and half the time.
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "32",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "64",
    "MODEL.ROI_BOX_HEAD.CONV_DIM", "64", "MODEL.ROI_BOX_HEAD.FC_DIM", "128",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "64",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def commands(page):
    """Lines of shell blocks, and what is written as `python ...` in the text."""
    lines = [line for block in code_blocks(page, "bash") for line in block.splitlines()]
    return lines + re.findall(r"`(python [^`]*)`", page.read_text())


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def shorten(command):
    """The words of a command as it runs here, but for {port}."""
    for there, here in (ON_CPUS | ON_ONE_MACHINE | OUT_OF_REACH).items():
        command = command.replace(there, here)
    if "tools/benchmark.py" in command:  # these are added below, to every command
        command = re.sub(r" --(turns|runs) \d+| --models GN\+WS GN", "", command)
        command = command.removesuffix(" --opts MODEL.DEVICE cpu")
    words = shlex.split(command)
    if "=" in words[0]:
        words.insert(0, "env")
    if "train_net.py" in words or "tools/slurm.sh" in words:
        # There is no network to get the ImageNet weights from.
        words += SMALL + ([] if "MODEL.WEIGHTS" in words else ["MODEL.WEIGHTS", ""])
        if "SOLVER.REFERENCE_WORLD_SIZE" not in words:  # which makes it several steps
            words += ["SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", "4"]
    if "tools/benchmark.py" in words:
        words[3:3] = ["--turns", "1", "--image-size", "64", "64", "--models", "GN+WS", "GN"]
        words += SMALL if "--opts" in words else ["--opts", *SMALL]
    if "tools/finetune.py" in words:  # for one step
        words += ["--epochs", "1", "--batch-size", "1", *SMALL, "SOLVER.IMS_PER_BATCH", "1"]
        words += ["SOLVER.ACCUMULATE_STEPS", "1", "MODEL.WEIGHTS", ""]
    if "tools/demo.py" in words and "output/fruits_nuts" not in words:
        words += ["--opts", *SMALL, "MODEL.WEIGHTS", "output/model_final.pth"]
    if "tools/reproduce_table.py" in words:
        words += SMALL
    if "tools/export_model.py" in words:  # an untrained model is sure of nothing
        words += [*SMALL, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.001"]
    return words


def programs(page):
    """What to run of a page; what several pages have, or has become the same, once."""
    found = []
    for each in PAGES[: PAGES.index(page) + 1]:
        before = len(found)
        for command in commands(each):
            if command.startswith(PROGRAMS) and not command.startswith(OWN_TESTS):
                words = shorten(command)
                found += [words] if words not in found else []
    return found[before:]


@pytest.fixture(scope="module")
def warm():
    with WarmPython() as warm:
        yield warm


@pytest.fixture(scope="module")
def trained(tmp_path_factory, warm):
    """The repository, with the photographs in place of COCO, and the runs that pages begin with."""
    checkout = tmp_path_factory.mktemp("trained")
    for name in ("configs", "tests", "tools", "train_net.py"):
        (checkout / name).symlink_to(ROOT / name)
    assets = ROOT / "tests" / "assets" / "fruits_nuts"
    coco = json.loads((assets / "trainval.json").read_text())
    coco["categories"] = [
        {"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]
    ]
    coco["images"] = coco["images"][:4]
    ids = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
    datasets = checkout / "datasets" / "coco"
    (datasets / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (datasets / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
        shutil.copytree(assets / "images", datasets / split)
    (checkout / "bin").mkdir()
    for name, text in SLURM.items():
        (checkout / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (checkout / "bin" / name).chmod(0o755)
    for command in (TRAIN, FINETUNE):
        warm.run(shorten(command), checkout)
    return checkout


@pytest.fixture
def checkout(trained, tmp_path):
    """A copy of its own for each page, which can then run in any order, and in any process."""
    return Path(shutil.copytree(trained, tmp_path / "checkout", symlinks=True))


def run(command, checkout, beside=None):
    """Run `command`, at the same time as `beside`."""
    path = [str(checkout / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(path)}
    environ.pop("DETECTRON2_DATASETS", None)
    other = beside and subprocess.Popen(beside, cwd=checkout, env=environ)
    done = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True)
    assert not other or other.wait() == 0, beside
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.ci
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name)
        for page in PAGES
        if programs(page) or code_blocks(page, "python")
    ],
)
def test_commands_and_python_of_a_page_run_in_order(page, checkout, warm):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    first = None
    for command in programs(page):
        words = [word.replace("{port}", port) for word in command]
        text = " ".join(words)
        if "--machine-rank 0" in text:
            first = words
        elif "--machine-rank 1" in text:
            run(words, checkout, beside=first)
            first = None
        elif words[0] != "python" or any(part in text for part in STARTS_PROCESSES):
            run(words, checkout)
        else:
            # The AP of one step is not that of the table.
            warm.run(words, checkout, status=1 if "tools/reproduce_table.py" in words else 0)
        if "tools/benchmark.py" in words:
            for suffix in (".md", ".json"):
                assert (checkout / "output" / "benchmark" / f"{words[2]}{suffix}").stat().st_size
    assert first is None
    for block in code_blocks(page, "python"):
        (checkout / "block.py").write_text(block)
        warm.run(["python", "block.py"], checkout)


def test_ci_runs_the_other_commands():
    every = {command for page in PAGES for command in commands(page)}
    assert {TRAIN, FINETUNE} <= every
    others = {command for command in every if not command.startswith(PROGRAMS)}
    assert others == {*CI_COMMANDS, *RUN_BY_CI}
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in CI_COMMANDS)


def test_links_to_files_exist():
    links = [(p, link) for p in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", p.read_text())]
    assert len(links) > 30
    assert [link for page, link in links if not (page.parent / link).exists()] == []


def test_no_page_is_empty():
    assert [page for page in PAGES if len(page.read_text().splitlines()) < 5] == []
