"""The main job, end to end, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()",
    "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
]  # fmt: skip


def train_net(*args, datasets):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *args],
        cwd=datasets,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fruits(photographs):
    return [
        "--dataset", "fruits", str(photographs.json_file), str(photographs.images),
        "--config-file", str(ROOT / "configs" / "quick_start.yaml"),
    ], ["DATASETS.TRAIN", "('fruits',)", "DATASETS.TEST", "('fruits',)", *TINY]  # fmt: skip


def read_metrics(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.json").read_text().splitlines()]
    return lines, {k: v for k, v in lines[-1].items() if k.startswith(("bbox/AP", "segm/AP"))}


def test_train_resume_evaluate_and_visualize(fruits, tmp_path):
    options, keys = fruits
    keys += ["OUTPUT_DIR", "output", "SOLVER.CHECKPOINT_PERIOD", "2"]
    output = tmp_path / "output"

    run = train_net(*options, *keys, "SOLVER.MAX_ITER", "2", datasets=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (output / "config.yaml").is_file() and (output / "model_0000001.pth").is_file()

    run = train_net("--resume", *options, *keys, "SOLVER.MAX_ITER", "4", datasets=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Starting training from iteration 2" in run.stdout
    assert torch.load(output / "model_final.pth", weights_only=False)["iteration"] == 3
    _, expected = read_metrics(output)
    assert {"bbox/AP", "segm/AP", "bbox/AP-date"} <= expected.keys()

    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", "evaluated"]
    run = train_net("--eval-only", *options, *keys, *weights, datasets=tmp_path)
    assert run.returncode == 0, run.stderr
    files = [
        d / "inference" / "coco_instances_results.json" for d in (output, tmp_path / "evaluated")
    ]
    trained, evaluated = (json.loads(path.read_text()) for path in files)
    assert len(trained) > 100 and trained == evaluated

    run = visualize("output", *options[:4], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "| box" in run.stdout and "| mask" in run.stdout
    for name in ("predictions.png", "losses.png"):
        assert cv2.imread(str(output / name)).std() > 10


def visualize(*args, cwd):
    tool = [sys.executable, str(ROOT / "tools" / "visualize_run.py"), *args]
    return subprocess.run(tool, cwd=cwd, capture_output=True, text=True)


def test_visualizing_what_is_no_run_is_an_error(tmp_path):
    run = visualize("nothing", cwd=tmp_path)
    assert run.returncode == 2 and "nothing/metrics.json" in run.stderr
    assert "Traceback" not in run.stderr


def test_two_processes_train_and_evaluate_every_image(fruits, tmp_path):
    """Through the launcher, on Gloo; the images of both ranks are evaluated, each once."""
    options, keys = fruits
    keys += ["SOLVER.MAX_ITER", "2", "SOLVER.REFERENCE_WORLD_SIZE", "0", "OUTPUT_DIR", "output"]
    run = train_net("--num-gpus", "2", "--dist-url", "auto", *options, *keys, datasets=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "output" / "log.txt.rank1").is_file()
    predictions = torch.load(
        tmp_path / "output" / "inference" / "instances_predictions.pth", weights_only=False
    )
    assert sorted(p["image_id"] for p in predictions) == list(range(18))
    _, ap = read_metrics(tmp_path / "output")
    assert {"bbox/AP", "segm/AP"} <= ap.keys()


@pytest.mark.parametrize("processes", [1, 2])
def test_truncated_image_stops_training_with_its_name(photographs, tmp_path, processes):
    coco = photographs.coco()
    images = tmp_path / "images"
    images.mkdir()
    for image in coco["images"]:
        data = (photographs.images / image["file_name"]).read_bytes()
        (images / image["file_name"]).write_bytes(data[: len(data) // 2])
    run = train_net(
        "--num-gpus", str(processes), "--dist-url", "auto",
        "--dataset", "cut", str(photographs.json_file), str(images),
        "--config-file", str(ROOT / "configs" / "quick_start.yaml"),
        "DATASETS.TRAIN", "('cut',)", "DATASETS.TEST", "()", *TINY, "DATALOADER.NUM_WORKERS", "1",
        "SOLVER.REFERENCE_WORLD_SIZE", "0", datasets=tmp_path,
    )  # fmt: skip
    assert run.returncode == 2
    assert "Traceback" not in run.stdout + run.stderr
    (error, *others) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert error.startswith("train_net.py: error: The image ") and "truncated" in error
    assert str(images) in error and error.count(".jpg") == 1
    assert not others or processes == 2


@pytest.mark.parametrize(
    "processes", [1, pytest.param(2, marks=pytest.mark.slow)], ids="{} processes".format
)
def test_killed_run_resumes_bit_for_bit(fruits, tmp_path, processes):
    """Killed at once after it wrote a checkpoint, and resumed with another number of workers."""
    options, keys = fruits
    keys += ["SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "5", "SEED", "1"]
    keys += ["TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()"]
    options += ["--num-gpus", str(processes), "--dist-url", "auto"]

    def weights(output, *args, workers):
        keys_ = [*keys, "OUTPUT_DIR", output, "DATALOADER.NUM_WORKERS", workers]
        run = train_net(*args, *options, *keys_, datasets=tmp_path)
        return run, tmp_path / output

    run, whole = weights("whole", workers="0")
    assert run.returncode == 0, run.stderr
    run, killed = weights("killed", workers="2")
    assert run.returncode == 0, run.stderr
    for name in ("model_final.pth", "model_0000003.pth"):  # as if killed before they were written
        (killed / name).unlink()
    (killed / "last_checkpoint").write_text("model_0000001.pth")
    run, killed = weights("killed", "--resume", workers="1")
    assert run.returncode == 0, run.stderr
    assert "Starting training from iteration 2" in run.stdout
    states = [torch.load(d / "model_final.pth", weights_only=False) for d in (whole, killed)]
    a, b = (state["model"] for state in states)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
