"""Bad input ends with one sentence and exit status 2, before any work, without a traceback."""

import io
import json
import re
import sys

import pytest
import torch
from conftest import ROOT

from gnws_d2.engine import train_net
from gnws_d2.engine.checks import check_precision
from gnws_d2.utils.errors import UserError
from gnws_tools.cli import main

QUICK_START = str(ROOT / "configs" / "quick_start.yaml")
COCO_CONFIG = str(ROOT / "configs" / "mask_rcnn_R50_gnws_2x.yaml")


@pytest.fixture
def fruits(photographs):
    return ["--dataset", "fruits_checked", str(photographs.json_file), str(photographs.images)]


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Run train_net.py's command line in this process, and return its error."""

    def fails(*args):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *args])
        monkeypatch.setattr(train_net, "launch", None)
        with pytest.raises(SystemExit) as e:
            main("train")
        assert e.value.code == 2
        out, err = capsys.readouterr()
        error = err.splitlines()[-1]
        assert out == "" and error.startswith("train_net.py: error: ") and "Traceback" not in err
        return error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return fails


def test_good_command_is_launched(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr(
        train_net, "launch", lambda main, num_gpus, **kwargs: launched.append(num_gpus)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", QUICK_START])
    main("train")
    assert launched == [1]


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--config-file"),
        (["--config-file", "gone.yaml"], "gone.yaml"),
        (
            ["--config-file", QUICK_START, "SOLVER.MAXITER", "3"],
            "no key SOLVER.MAXITER, did you mean SOLVER.MAX_ITER.$",
        ),
        (["--config-file", QUICK_START, "NOTHING.LIKE", "3"], "no key NOTHING.LIKE.$"),
        (["--config-file", QUICK_START, "SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["--config-file", QUICK_START, "SOLVER.MAX_ITER"], "SOLVER.MAX_ITER"),
        (
            ["--config-file", QUICK_START, "SEED", "1", "--resume"],
            "Options like --resume go before",
        ),
        (
            ["--config-file", QUICK_START, "MODEL.WEIGHTS", "gone.pth"],
            "checkpoint gone.pth does not exist",
        ),
        (["--config-file", QUICK_START, "--eval-only"], "MODEL.WEIGHTS is empty"),
        (
            [
                "--config-file",
                QUICK_START,
                "--eval-only",
                "TEST.PREDICTIONS",
                "a.json",
                "DATASETS.TEST",
                "('shapes_train', 'shapes_val')",
            ],
            "TEST.PREDICTIONS a.json is of one dataset: .*DATASETS.TEST, which has 2.",
        ),
        (["--config-file", QUICK_START, "--num-gpus", "3"], "IMS_PER_BATCH .* 3 workers"),
        (["--config-file", QUICK_START, "--num-gpus", "0"], "--num-gpus 0"),
        (
            ["--config-file", QUICK_START, "SOLVER.REFERENCE_WORLD_SIZE", "3"],
            "SOLVER.IMS_PER_BATCH 4 .* SOLVER.REFERENCE_WORLD_SIZE 3",
        ),
        (["--config-file", QUICK_START, "SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED"),
        (
            ["--config-file", QUICK_START, "SOLVER.ACCUMULATE_STEPS", "3"],
            "SOLVER.ACCUMULATE_STEPS 3 does not divide the 4 images",
        ),
        (["--config-file", QUICK_START, "DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (
            ["--config-file", QUICK_START, "DATASETS.TRAIN", "('mine',)"],
            "DATASETS.TRAIN names mine, .*--dataset mine ANNOTATIONS.json IMAGE_ROOT",
        ),
        (
            ["--config-file", QUICK_START, "MODEL.ROI_HEADS.NUM_CLASSES", "80"],
            "NUM_CLASSES is 80, .* 3 classes .circle, square, triangle.",
        ),
        (
            ["--config-file", COCO_CONFIG, "MODEL.DEVICE", "cpu"],
            "coco_2017_train does not exist: .*instances_train2017.json",
        ),
    ],
)
def test_mistake_is_named(fails, args, message):
    error = fails(*args)
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "device, precision, flags, refused",
    [
        ("cuda", "float16", "", False),
        ("cuda", "bfloat16", "", False),
        ("cuda", "half", "", True),
        ("cpu", "float16", "avx512_bf16 amx_bf16", True),
        ("cpu", "bfloat16", "avx2 avx512f", True),
        ("cpu", "bfloat16", "avx512f avx512_bf16", False),
        ("cpu", "bfloat16", "amx_bf16", False),
        ("cpu", "bfloat16", "asimd svei8mm", True),
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
    assert "MODEL.DEVICE cpu" in fails("--config-file", QUICK_START, "MODEL.DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    error = fails("--config-file", QUICK_START, "--num-gpus", "4", "MODEL.DEVICE", "cuda")
    assert "--num-gpus 4" in error and "2 GPUs" in error


def test_datasets_of_different_classes_are_named(fails, fruits):
    error = fails(*fruits, "--config-file", QUICK_START, "DATASETS.TEST", "('fruits_checked',)")
    assert "shapes_train (circle, square, triangle)" in error
    assert "fruits_checked (date, fig, hazelnut)" in error


def test_missing_files_of_a_dataset_are_named(fails, photographs, tmp_path):
    for json_file, image_root, missing in (
        (tmp_path / "a.json", photographs.images, tmp_path / "a.json"),
        (photographs.json_file, tmp_path / "images", tmp_path / "images"),
    ):
        name = f"missing_{missing.name.replace('.', '_')}"
        error = fails(
            "--dataset", name, str(json_file), str(image_root),
            "--config-file", QUICK_START, "DATASETS.TRAIN", f"('{name}',)",
        )  # fmt: skip
        assert f"of the dataset {name} does not exist: {missing}" in error


def test_missing_image_stops_unless_training_skips_it(fails, photographs, tmp_path, monkeypatch):
    coco = photographs.coco()
    coco["images"][3]["file_name"] = "gone.jpg"
    path = tmp_path / "missing.json"
    path.write_text(json.dumps(coco))
    classes = ["DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    command = [
        "--dataset", "missing", str(path), str(photographs.images),
        "--config-file", QUICK_START, *classes, "DATASETS.TRAIN", "('missing',)",
    ]  # fmt: skip
    assert "image id 3 has a file that does not exist" in fails(*command)
    test = ["DATASETS.TEST", "('missing',)", "INPUT.ON_BAD_IMAGE", "skip"]
    assert "image id 3 has a file that does not exist" in fails(*command, *test)
    launched = []
    monkeypatch.setattr(
        train_net, "launch", lambda main, num_gpus, **kwargs: launched.append(num_gpus)
    )
    monkeypatch.setattr(sys, "argv", ["train_net.py", *command, "INPUT.ON_BAD_IMAGE", "skip"])
    main("train")
    assert launched == [1]


def test_masks_from_annotations_without_segmentation_are_an_error(fails, photographs, tmp_path):
    coco = photographs.coco()
    del coco["annotations"][5]["segmentation"]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(coco))
    error = fails(
        "--dataset", "boxes", str(path), str(photographs.images),
        "--config-file", QUICK_START, "DATASETS.TRAIN", "('boxes',)",
    )  # fmt: skip
    assert (
        f"{path}: annotation id 6 has the segmentation None" in error and "MODEL.MASK_ON" in error
    )


def test_faulty_annotation_is_named(fails, photographs, tmp_path):
    coco = photographs.coco()
    coco["annotations"][5].update(id=1234, category_id=9)
    path = tmp_path / "faulty.json"
    path.write_text(json.dumps(coco))
    error = fails(
        "--dataset", "faulty", str(path), str(photographs.images),
        "--config-file", QUICK_START, "DATASETS.TRAIN", "('faulty',)",
    )  # fmt: skip
    assert f"{path}: annotation id 1234 has category id 9" in error


def test_weights_and_biases_that_is_not_installed_is_an_error(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = fails("--config-file", QUICK_START, "WANDB.PROJECT", "shapes")
    assert "WANDB.PROJECT is shapes" in error and "pip install wandb" in error
