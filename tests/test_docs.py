"""
The commands and the Python of each page run in reading order, on small images and for one step.
README.md starts in a fresh directory, and the other pages start from what it leaves.
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

import cv2
import pytest
import torch
from conftest import NARROW, ROOT, Photographs, mmdet_state
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from iopath.common.file_io import file_lock
from warm import WarmPython

from gnws_d2.checkpoint.catalog import checkpoint_urls

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
# Run by .ci/run, or too long for a test.
NOT_HERE = {
    "bash tools/run_tests.sh", "bash .ci/run", "ruff check", "ruff format --check", "mypy",
    "pytest tests/layers/test_weight_standardization.py", "python tools/benchmark.py gpu",
}  # fmt: skip
# These start Python themselves; the others are forked from one with Detectron2 (tests/warm.py).
STARTS_PROCESSES = ("--num-gpus 2", "tools/benchmark.py", "tools/reproduce_table.py")
# Stand-ins for what is out of reach of a test: GPUs, machines, published files. Two machines of
# --num-machines are two commands, which run at the same time.
STAND_INS = {
    "--num-gpus 8": "--num-gpus 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--nnodes 2": "--nnodes 1",
    "HOST0:29500": "127.0.0.1:{port}",
    "gnws://mask_rcnn_R50_gnws_2x": "output/mask_rcnn_R50_gnws_2x/model_final.pth",
    "tools/reproduce_table.py": "tools/reproduce_table.py --models mask_rcnn_R50_gnws_2x --opts "
    "MODEL.WEIGHTS output/mask_rcnn_R50_gnws_2x/model_final.pth",
}
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
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "10",
    *NARROW,  # checkpoints of 70 MB, not 500, and half the time
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def steps(page):
    """
    Commands, as lists of words, and blocks of Python, as strings, in reading order. What README.md
    or the page itself has above is not repeated.
    """
    found = []
    for path in dict.fromkeys([README, page]):
        start = 0 if path == README else len(found)
        pattern = r"^```(bash|python)\n(.*?)^```|`(python [^`]*)`"
        for match in re.finditer(pattern, path.read_text(), re.DOTALL | re.MULTILINE):
            language, block, in_text = match.groups()
            if language == "python":
                found.append(block)
                continue
            for command in (block or in_text).splitlines():
                of_command = [] if command in NOT_HERE else shorten(command)
                found += [words for words in of_command if words not in found]
    return found if page == README else found[start:]


def shorten(command):
    """The commands, as lists of words, that stand for one of the documentation."""
    if command == "bash tools/quick_start.sh":  # without the set-up, and for a few iterations
        lines = (ROOT / "tools" / "quick_start.sh").read_text().splitlines()
        train, report = [line for line in lines if line.startswith('"$python" ')]
        short = "SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1"
        lines = [train.replace('"$@"', short), report]
        return [shlex.split(line.replace('"$python"', "python")) for line in lines]
    for there, here in STAND_INS.items():
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
    if "tools/reproduce_table.py" in words:
        words += SMALL
    if "tools/export_model.py" in words:  # an untrained model is sure of nothing
        words += [*SMALL, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.001"]
    return [words]


@pytest.fixture(scope="module")
def warm():
    with WarmPython() as warm:
        yield warm


def make_checkout(checkout):
    """
    The repository, with a few photographs as COCO and as a video, published weights put there by
    hand, and stand-ins for Slurm's commands.
    """
    checkout.mkdir()
    for name in ("configs", "tests", "tools", "train_net.py"):
        (checkout / name).symlink_to(ROOT / name)
    assets = ROOT / "tests" / "assets" / "fruits_nuts"
    coco = Photographs().coco(4)
    coco["categories"] = [
        {"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]
    ]
    datasets = checkout / "datasets" / "coco"
    (datasets / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (datasets / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
        shutil.copytree(assets / "images", datasets / split)
    size, codec = (200, 150), cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(checkout / "video.mp4"), codec, 25, size)
    for name in ("0.jpg", "1.jpg"):
        writer.write(cv2.resize(cv2.imread(str(assets / "images" / name)), size))
    writer.release()
    cache = checkout.parent / "cache"
    (cache / "gnws_d2").mkdir(parents=True, exist_ok=True)
    (checkout / "cache").symlink_to(cache)
    name = "mask_rcnn_R50_gnws_2x"
    file_name = os.path.basename(checkpoint_urls()[name])
    weights = {"meta": {}, "state_dict": mmdet_state(name)}
    torch.save(weights, cache / "gnws_d2" / file_name)
    (checkout / "bin").mkdir()
    for name, text in SLURM.items():
        (checkout / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (checkout / "bin" / name).chmod(0o755)


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory, warm):
    """A directory in which the steps of README.md have run: once, for all workers of the tests."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    checkout = (base.parent if is_worker else base) / "readme"
    finished = checkout / "finished"
    with file_lock(str(checkout)):
        if not finished.exists():
            shutil.rmtree(checkout, ignore_errors=True)
            make_checkout(checkout)
            run_steps(README, checkout, warm)
            finished.touch()
    return checkout


def run(command, checkout, beside=None, status=0):
    """Run `command`, at the same time as `beside`."""
    path = [str(checkout / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(path)}
    environ["FVCORE_CACHE"] = "cache"
    environ.pop("DETECTRON2_DATASETS", None)
    other = beside and subprocess.Popen(beside, cwd=checkout, env=environ)
    done = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True)
    assert not other or other.wait() == 0, beside
    assert done.returncode == status, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def run_steps(page, checkout, warm):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    first = None
    for step in steps(page):
        if isinstance(step, str):
            (checkout / "block.py").write_text(step)
            warm.run(["python", "block.py"], checkout)
            continue
        words = [word.replace("{port}", port) for word in step]
        text = " ".join(words)
        # The AP of one step is not that of the table.
        status = 1 if "tools/reproduce_table.py" in words else 0
        if "--machine-rank 0" in text:
            first = words
        elif "--machine-rank 1" in text:
            run(words, checkout, beside=first)
            first = None
        elif words[0] != "python" or any(part in text for part in STARTS_PROCESSES):
            run(words, checkout, status=status)
        else:
            warm.run(words, checkout)
    assert first is None


@pytest.mark.ci
def test_readme_runs_in_a_fresh_directory(after_readme):
    for name in ("quick_start", "mask_rcnn_R50_gnws_2x", "fruits_nuts"):
        assert (after_readme / "output" / name / "model_final.pth").is_file()
    assert (after_readme / "output" / "quick_start" / "report.html").is_file()
    assert (after_readme / "output" / "demo" / "detections.json").is_file()


@pytest.mark.ci
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p != README and steps(p)], ids=lambda p: p.name
)
def test_page_runs_after_the_readme(page, after_readme, warm, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(after_readme, checkout, symlinks=True)
    run_steps(page, checkout, warm)


def test_quoted_errors_are_messages_of_the_package():
    """`...` stands for what a message contains from the run."""
    code = "".join(path.read_text() for path in sorted((ROOT / "gnws_d2").rglob("*.py")))
    code = re.sub(r"[\"']\n\s*f?[\"']", "", code)  # strings that Python joins
    page = (ROOT / "docs" / "common_errors.md").read_text()
    quoted = re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)
    assert len(quoted) > 9
    for message in quoted:
        pattern = r"[^\n]*?".join(map(re.escape, message.split("...")))
        assert re.search(pattern, code), message


def test_links_to_files_exist():
    links = [(p, link) for p in PAGES for link in re.findall(r"\]\(([^)#:]+)[)#]", p.read_text())]
    assert len(links) > 30
    assert [link for page, link in links if not (page.parent / link).exists()] == []
