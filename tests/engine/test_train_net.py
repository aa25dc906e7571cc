"""The main job, end to end, as a user starts it."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, launches_on_cpu, processes_of_test, run_python, wait_for

from gnws_d2.config import load_config
from gnws_d2.evaluation import best_thresholds, evaluate_results, read_truth


def start_train_net(*args, datasets, cwd=None):
    environ = {**os.environ, "DETECTRON2_DATASETS": str(datasets)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    command = [sys.executable, str(ROOT / "train_net.py"), *args]
    return subprocess.Popen(command, cwd=cwd or datasets, env=environ, text=True, **pipes)


def train_net(*args, datasets, status=0):
    run = end(start_train_net(*args, datasets=datasets))
    assert run.returncode == status, run.stderr
    return run


def end(process):
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def fruits(photographs):
    return [
        "--dataset", "fruits", str(photographs.json_file), str(photographs.images),
        "--config-file", str(ROOT / "configs" / "quick_start.yaml"),
    ], ["DATASETS.TRAIN", "('fruits',)", "DATASETS.TEST", "('fruits',)", *TINY]  # fmt: skip


def read_metrics(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.json").read_text().splitlines()]
    return lines, {k: v for k, v in lines[-1].items() if k.startswith(("bbox/AP", "segm/AP"))}


def test_train_resume_evaluate_and_report(fruits, tmp_path):
    options, keys = fruits
    keys += ["OUTPUT_DIR", "output", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "2"]
    output = tmp_path / "output"

    run = train_net("--resume", *options, *keys, "SOLVER.MAX_ITER", "2", datasets=tmp_path)
    assert not any(word in run.stderr for word in ("deprecat", "meshgrid", "is_fx_tracing"))
    assert (output / "config.yaml").is_file() and (output / "model_0000001.pth").is_file()

    run = train_net("--resume", *options, *keys, "SOLVER.MAX_ITER", "4", datasets=tmp_path)
    assert "Starting training from iteration 2" in run.stdout
    first, second = json.loads((output / "run.json").read_text())
    assert (first["iterations"], second["first_iteration"], second["iterations"]) == (2, 2, 4)
    assert first["status"] == second["status"] == "finished"
    assert torch.load(output / "model_final.pth", weights_only=False)["iteration"] == 3
    _, expected = read_metrics(output)
    assert {"bbox/AP", "segm/AP", "bbox/AP-date"} <= expected.keys()
    best = torch.load(output / "model_best.pth")["trainer"]["hooks"]["BestCheckpointer"]
    assert best["best_metric"] >= expected["segm/AP"] and best["best_iter"] in (1, 3)

    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", "evaluated"]
    weights += ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 100, 0.1]]"]
    run = train_net("--eval-only", *options, *keys, *weights, datasets=tmp_path, status=1)
    assert "verification failed" in run.stdout
    files = [
        d / "inference" / "coco_instances_results.json" for d in (output, tmp_path / "evaluated")
    ]
    trained, evaluated = (json.loads(path.read_text()) for path in files)
    assert len(trained) > 100 and trained == evaluated
    truth = read_truth(options[2])
    best, _ = best_thresholds(evaluate_results(truth, trained, "bbox", iou_threshold=0.5))
    for directory in (output, tmp_path / "evaluated"):
        threshold = json.loads((directory / "threshold.json").read_text())["threshold"]
        assert threshold == best.threshold

    tool = ROOT / "tools" / "report.py"
    printed = run_python(tool, "output", *options[:4], cwd=tmp_path)
    assert "| box " in printed and "| mask " in printed
    page = (output / "report.html").read_text()
    for text in ("4 of 4", f"torch {torch.__version__.partition('+')[0]}", "gnws_d2 0", "threads"):
        assert text in page, text
    run_python(tool, "evaluated", *options[:4], cwd=tmp_path)
    assert "nothing was trained here" in (tmp_path / "evaluated" / "report.html").read_text()


@pytest.mark.ci
def test_two_processes_train_and_evaluate_every_image(fruits, tmp_path):
    """Through the launcher, on Gloo; the images of both ranks are evaluated, each once."""
    options, keys = fruits
    keys += ["SOLVER.MAX_ITER", "2", "SOLVER.REFERENCE_WORLD_SIZE", "0", "OUTPUT_DIR", "output"]
    train_net("--num-gpus", "2", *options, *keys, datasets=tmp_path)
    assert (tmp_path / "output" / "log.txt.rank1").is_file()
    file = tmp_path / "output" / "inference" / "coco_instances_results.json"
    predictions = json.loads(file.read_text())
    assert list(dict.fromkeys(p["image_id"] for p in predictions)) == list(range(18))
    _, ap = read_metrics(tmp_path / "output")
    assert {"bbox/AP", "segm/AP"} <= ap.keys()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.ci)])
def test_truncated_image_stops_training_with_its_name(photographs, tmp_path, processes):
    coco = photographs.coco()
    images = tmp_path / "images"
    images.mkdir()
    for image in coco["images"]:
        data = (photographs.images / image["file_name"]).read_bytes()
        (images / image["file_name"]).write_bytes(data[: len(data) // 2])
    run = train_net(
        "--num-gpus", str(processes),
        "--dataset", "cut", str(photographs.json_file), str(images),
        "--config-file", str(ROOT / "configs" / "quick_start.yaml"),
        "DATASETS.TRAIN", "('cut',)", "DATASETS.TEST", "()", *TINY, "DATALOADER.NUM_WORKERS", "1",
        "SOLVER.REFERENCE_WORLD_SIZE", "0", datasets=tmp_path, status=2,
    )  # fmt: skip
    assert "Traceback" not in run.stdout + run.stderr
    (error,) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert error.startswith("train_net.py: error: The image ") and "truncated" in error
    assert str(images) in error and error.count(".jpg") == 1


@pytest.mark.ci
def test_sigterm_leaves_a_checkpoint_that_another_number_of_processes_resumes(fruits, tmp_path):
    """With half the batch size, both the iterations done and the iterations to do are doubled."""
    options, keys = fruits
    keys += ["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "4", "OUTPUT_DIR", "out"]
    keys += ["DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.WARMUP_ITERS", "0"]
    keys += ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "DATALOADER.NUM_WORKERS", "2"]
    output = tmp_path / "out"

    two = ["--num-gpus", "2", "--dist-url", "auto"]
    run = train_net(*two, *options, *keys, "SOLVER.MAX_ITER", "3", datasets=tmp_path)
    process = start_train_net(
        "--resume", *options, *keys, "SOLVER.MAX_ITER", "1000", datasets=tmp_path
    )
    wait_for((output / "model_0000007.pth").exists)
    process.send_signal(signal.SIGTERM)
    run = end(process)
    assert run.returncode == 143, run.stderr
    assert "The 3 iterations so far, with another batch size, are 6 of 2000" in run.stdout
    assert "Starting training from iteration 6" in run.stdout
    last = (output / "last_checkpoint").read_text()
    assert f"Stopped by SIGTERM after iteration {int(last[6:13])}, with a checkpoint" in run.stdout
    assert torch.load(output / last)["iteration"] == int(last[6:13])
    lines, _ = read_metrics(output)
    assert lines[0]["lr"] == pytest.approx(0.05) and lines[-1]["lr"] == pytest.approx(0.025)


@launches_on_cpu
@pytest.mark.ci
def test_sigterm_to_all_processes_of_a_job_stops_an_evaluation(fruits, tmp_path):
    """As Slurm, systemd and `kill -- -PGID` send it; resumed, the evaluation comes first."""
    options, keys = fruits
    keys += ["OUTPUT_DIR", "out", "TEST.EVAL_PERIOD", "2", "DATALOADER.NUM_WORKERS", "2"]
    keys += ["SOLVER.REFERENCE_WORLD_SIZE", "0", "DATASETS.TEST", "('shapes_train',)"]
    keys += ["DATASETS.TRAIN", "('shapes_train',)", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    options, log = ["--num-gpus", "2", *options[4:]], tmp_path / "out" / "log.txt"
    process = start_train_net(*options, *keys, "SOLVER.MAX_ITER", "4", datasets=tmp_path)
    wait_for(lambda: log.exists() and "Inference done" in log.read_text())
    os.killpg(process.pid, signal.SIGTERM)
    run = end(process)
    assert run.returncode == 143 and "Traceback" not in run.stdout + run.stderr, run.stderr
    assert "Stopped by SIGTERM after iteration 1, with a checkpoint" in run.stdout
    assert "Computing AP" not in run.stdout
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert processes_of_test() == []

    process = start_train_net(
        "--resume", *options, *keys, "SOLVER.MAX_ITER", "4", datasets=tmp_path
    )
    wait_for(lambda: "First, the evaluation that was interrupted." in log.read_text())
    os.killpg(process.pid, signal.SIGINT)
    run = end(process)
    assert run.returncode == 130 and "Traceback" not in run.stdout + run.stderr, run.stderr


@pytest.mark.ci
def test_evaluation_leaves_the_files_of_a_training_alone(fruits, tmp_path):
    options, keys = fruits
    keys += ["SOLVER.MAX_ITER", "3", "SOLVER.REFERENCE_WORLD_SIZE", "0"]
    train_net(*options, *keys, "OUTPUT_DIR", "out", datasets=tmp_path)

    def files(directory):
        return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}

    before, copy = files(tmp_path / "out"), tmp_path / "copy"
    shutil.copytree(tmp_path / "out", copy)
    # In a copy of the run, which its config.yaml stands for now.
    evaluate = ["--eval-only", "--resume", *options[:4], "--config-file", str(copy / "config.yaml")]
    train_net(*evaluate, "TEST.DETECTIONS_PER_IMAGE", "7", datasets=tmp_path)
    after = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    assert files(tmp_path / "out") == before
    assert {name: before[name] for name in after} == after
    assert files(copy / "inference").items() <= before.items()
    evaluated = load_config(str(copy / "evaluation" / "config.yaml"), [])
    assert evaluated.TEST.DETECTIONS_PER_IMAGE == 7
    assert (copy / "evaluation" / "inference" / "coco_instances_results.json").is_file()
    # And resumed, the copy is written to.
    resume = ["--resume", *evaluate[2:], "SOLVER.MAX_ITER", "5"]
    train_net(*resume, datasets=tmp_path)
    assert files(tmp_path / "out") == before
    assert torch.load(copy / "model_final.pth")["iteration"] == 4


@launches_on_cpu
def test_machines_without_a_shared_output_dir_do_not_resume(fruits, tmp_path):
    """They would train two models: only rank 0 writes checkpoints."""
    options, keys = fruits
    keys += ["DATASETS.TEST", "()", "SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", "2"]
    keys += ["SOLVER.MAX_ITER", "2"]
    run = train_net(*options, *keys, "OUTPUT_DIR", "out", datasets=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    machines = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        if rank == 0:
            shutil.copytree(tmp_path / "out", tmp_path / "0" / "out")
        where = ["--num-machines", "2", "--machine-rank", str(rank)]
        where += ["--dist-url", f"tcp://127.0.0.1:{port}", "--resume"]
        machines.append(
            start_train_net(
                *where, *options, *keys, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", "5",
                datasets=tmp_path, cwd=tmp_path / str(rank),
            )
        )  # fmt: skip
    for run in map(end, machines):
        assert run.returncode == 2, run.stderr
        starts = r"\(model_final.pth at iteration \d+ and no checkpoint at iteration 0\)"
        assert re.search(f"Ranks 0 and 1 differ in the start {starts}: start all with", run.stderr)


def test_full_disk_stops_with_the_last_checkpoint_whole(fruits, tmp_path):
    """
    The disk is a limit on the size of files, set once the first checkpoint is there. The last
    checkpoint of another training in the directory is forgotten at the start.
    """
    options, keys = fruits
    keys += ["SOLVER.CHECKPOINT_PERIOD", "3", "OUTPUT_DIR", "output", "DATASETS.TEST", "()"]
    output = tmp_path / "output"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_0000999.pth")
    process = start_train_net(*options, *keys, datasets=tmp_path)
    wait_for(lambda: not (output / "last_checkpoint").exists())
    wait_for((output / "last_checkpoint").exists)
    size = (output / "model_0000002.pth").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    run = end(process)
    assert run.returncode == 2 and "Traceback" not in run.stdout + run.stderr
    (error,) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert error.startswith("train_net.py: error: Cannot write output/model_") and "large" in error
    last = (output / "last_checkpoint").read_text()
    assert sorted(p.name for p in output.glob("*.pth*"))[-1] == last
    assert torch.load(output / last)["iteration"] == int(last[6:13])


@pytest.mark.ci
def test_new_training_forgets_the_checkpoints_of_another(fruits, tmp_path):
    options, keys = fruits
    keys += ["OUTPUT_DIR", "output", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "1"]
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000999.pth")
    (tmp_path / "output" / "threshold.json").write_text('{"threshold": 0.9}')
    process = start_train_net(*options, *keys, "SOLVER.MAX_ITER", "1000", datasets=tmp_path)
    wait_for((tmp_path / "output" / "model_0000000.pth").exists)
    os.killpg(process.pid, signal.SIGINT)
    run = end(process)
    assert run.returncode == 130 and "Traceback" not in run.stderr
    assert run.stdout.count("Stopped by SIGINT after iteration") == 1
    assert not (tmp_path / "output" / "threshold.json").exists()
    assert (tmp_path / "output" / "last_checkpoint").read_text() in os.listdir(tmp_path / "output")
    assert processes_of_test() == []
