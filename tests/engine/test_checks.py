"""Bad input ends with one sentence and exit status 2, before any work, without a traceback."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from gnws_d2.engine import train_net
from gnws_d2.engine.checks import check_precision
from gnws_d2.utils.errors import UserError


@pytest.fixture
def launched(monkeypatch):
    """The number of processes of each launch, none of which is made."""
    launched = []
    monkeypatch.setattr(
        train_net, "launch", lambda main, num_gpus, **kwargs: launched.append(num_gpus)
    )
    return launched


@pytest.fixture
def fails(monkeypatch, gnws, tmp_path, launched):
    """Run `gnws train`, and return its error."""

    def fails(*args, config="quick_start"):
        status, out, err = gnws("train", *(["--config-file", config] if config else []), *args)
        error = err.splitlines()[-1]
        assert status == 2 and out == "" and error.startswith("gnws train: error: ")
        assert launched == []
        return error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return fails


@pytest.mark.parametrize(
    "args, message",
    [
        ("SOLVER.EMA_DECAY 1.0", "SOLVER.EMA_DECAY is 1.0: set it to .* from 0.0 to 0.99999.$"),
        ("TEST.MAX_TIME_SHARE -1.0", "TEST.MAX_TIME_SHARE is -1.0: .* from 0.0 to 1.0.$"),
        ("MODEL.RPN.MIN_LOW_QUALITY_IOU 2.0", "MIN_LOW_QUALITY_IOU is 2.0: .* from 0.0 to 1.0.$"),
        ("INPUT.COPY_PASTE 1.5", "INPUT.COPY_PASTE is 1.5: .* from 0.0 to 1.0.$"),
        ("SOLVER.MAXITER 3", "no key SOLVER.MAXITER, did you mean SOLVER.MAX_ITER.$"),
        ("NOTHING.LIKE 3", "no key NOTHING.LIKE.$"),
        ("SOLVER.MAX_ITER many", "SOLVER.MAX_ITER"),
        ("SOLVER.MAX_ITER", "SOLVER.MAX_ITER"),
        ("SEED 1 --resume", "Options like --resume go before"),
        ("MODEL.WEIGHTS gone.pth", "checkpoint gone.pth does not exist"),
        ("--eval-only", "MODEL.WEIGHTS is empty"),
        ("--num-gpus 3", "IMS_PER_BATCH .* 3 workers"),
        ("--num-gpus 0", "--num-gpus 0"),
        ("--machine-rank -1", "--machine-rank -1: "),
        ("--num-machines 2 --machine-rank 2", "--machine-rank 2: .* from 0"),
        ("--num-machines 2", "--dist-url auto: for several machines set it to tcp://HOST:PORT"),
        ("SOLVER.REFERENCE_WORLD_SIZE 3", "IMS_PER_BATCH 4 .* SOLVER.REFERENCE_WORLD_SIZE 3"),
        ("SOLVER.AMP.ENABLED True", "SOLVER.AMP.PRECISION float16"),
        ("SOLVER.ACCUMULATE_STEPS 3", "IMS_PER_BATCH 4 .* 1 workers .* SOLVER.ACCUMULATE_STEPS 3"),
        ("DATASETS.TRAIN ()", "DATASETS.TRAIN is empty"),
        (
            "DATASETS.TRAIN ('mine',)",
            "TRAIN names mine, .*--dataset mine ANNOTATIONS.json",
        ),
        ("MODEL.ROI_HEADS.NUM_CLASSES 80", "NUM_CLASSES is 80, .* 3 classes .circle, square"),
    ],
)
def test_mistake_is_named(fails, args, message):
    error = fails(*args.split())
    assert re.search(message, error), error


def test_file_that_is_missing_is_named(fails, photographs, tmp_path):
    no_json = ["--dataset", "a", tmp_path / "a.json", photographs.images]
    no_images = ["--dataset", "b", photographs.json_file, tmp_path / "b"]
    names = ["DATASETS.TRAIN", "('a',)"], ["DATASETS.TRAIN", "('b',)"]
    coco = "coco/annotations/instances_train2017.json"
    for config, args, message in (
        ("", [], "--config-file"),
        ("gone.yaml", [], "gone.yaml"),
        ("mask_rcnn_R50_gnws_2x", ["MODEL.DEVICE", "cpu"], coco),
        ("quick_start", [*no_json, *names[0]], f"dataset a does not exist: {tmp_path / 'a.json'}"),
        ("quick_start", [*no_images, *names[1]], f"dataset b does not exist: {tmp_path / 'b'}"),
    ):
        assert message in fails(*args, config=config)


@pytest.mark.parametrize(
    "device, precision, flags, refused",
    [
        ("cuda", "bfloat16", "", False),
        ("cuda", "half", "", True),
        ("cpu", "float16", "avx512_bf16 amx_bf16", True),
        ("cpu", "bfloat16", "avx2 avx512f", True),
        ("cpu", "bfloat16", "avx512f avx512_bf16", False),
        ("cpu", "bfloat16", "asimd bf16 svebf16", False),
    ],
)
def test_precision_that_a_cpu_emulates_is_refused(monkeypatch, device, precision, flags, refused):
    name = "Features\t" if "asimd" in flags else "flags\t\t"
    cpuinfo = f"processor : 0\n{name}: fpu {flags}\n"
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO(cpuinfo))
    if refused:
        with pytest.raises(UserError, match=rf"SOLVER\.AMP\.PRECISION .*{precision}"):
            check_precision(device, precision)
    else:
        check_precision(device, precision)


def test_missing_gpu_is_named(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "MODEL.DEVICE cpu" in fails("MODEL.DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    error = fails("--num-gpus", "4", "MODEL.DEVICE", "cuda")
    assert "--num-gpus 4" in error and "2 GPUs" in error


def test_datasets_of_different_classes_are_named(fails, photographs):
    fruits = ["--dataset", "fruits_checked", str(photographs.json_file), str(photographs.images)]
    error = fails(*fruits, "DATASETS.TEST", "('fruits_checked',)")
    assert "shapes_train (circle, square, triangle)" in error
    assert "fruits_checked (date, fig, hazelnut)" in error


def test_missing_image_stops_unless_training_skips_it(fails, launched, gnws, photographs, tmp_path):
    coco = photographs.coco()
    coco["images"][3]["file_name"] = "gone.jpg"
    path = tmp_path / "missing.json"
    path.write_text(json.dumps(coco))
    command = ["--dataset", "missing", path, photographs.images, "DATASETS.TRAIN", "('missing',)"]
    command += ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "DATASETS.TEST", "()"]
    skip = ["INPUT.ON_BAD_IMAGE", "skip"]
    for keys in ([], [*skip, "DATASETS.TEST", "('missing',)"]):
        assert "image id 3 has a file that does not exist" in fails(*command, *keys)
    status, _, _ = gnws("train", "--config-file", "quick_start", *command, *skip)
    assert status == 0 and launched == [1]


def test_restarts_by_torchrun_need_a_store_for_each_start(fails, monkeypatch):
    environment = dict(
        TORCHELASTIC_RUN_ID="1", TORCHELASTIC_RESTART_COUNT="0", RANK="0", LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="2", WORLD_SIZE="4", GROUP_RANK="0", GROUP_WORLD_SIZE="2",
    )  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    options = ["--num-gpus", "2", "--num-machines", "2"]
    assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in fails(*options)


def test_output_dir_that_cannot_be_written_is_named(tmp_path, fails):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        assert f"OUTPUT_DIR {path} cannot be written: " in fails("OUTPUT_DIR", str(path))


def test_weights_and_biases_that_is_not_installed_is_an_error(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = fails("WANDB.PROJECT", "shapes")
    assert "WANDB.PROJECT is shapes" in error and "pip install wandb" in error


def test_processes_on_cpus_with_detectron2_v0_6_are_an_error(fails, monkeypatch):
    monkeypatch.setattr("gnws_d2.engine.checks.LAUNCHES_ON_CPU", False)
    error = fails("--num-gpus", "2", "MODEL.DEVICE", "cpu")
    assert "Start them by torchrun --nproc-per-node 2 train_net.py" in error
