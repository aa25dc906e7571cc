"""Bad input ends with one sentence and exit status 2, before any work, without a traceback."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train_net
from gnws_d2.engine import load_config

ROOT = Path(__file__).parent.parent.parent
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
            train_net.invoke_main()
        assert e.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("train_net.py: error: ") and err.count("\n") == 1
        return err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return fails


def test_good_command_is_launched(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr(
        train_net, "launch", lambda *args, **kwargs: launched.append(args[2].num_gpus)
    )
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", QUICK_START])
    train_net.invoke_main()
    assert launched == [1]


def test_config_goes_by_its_name_in_the_zoo_too(tmp_path, monkeypatch):
    assert load_config("quick_start", []) == load_config(QUICK_START, [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick_start").write_text("SEED: 7")
    assert load_config("quick_start", []).SEED == 7


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--config-file"),
        (["--config-file", "gone.yaml"], "gone.yaml"),
        (["--config-file", QUICK_START, "SOLVER.MAXITER", "3"], "SOLVER.MAXITER"),
        (["--config-file", QUICK_START, "SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["--config-file", QUICK_START, "SOLVER.MAX_ITER"], "SOLVER.MAX_ITER"),
        (["--config-file", QUICK_START, "SEED", "1", "--resume"], "--resume"),
        (["--config-file", QUICK_START, "MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS gone.pth"),
        (["--config-file", QUICK_START, "--eval-only"], "MODEL.WEIGHTS is empty"),
        (["--config-file", QUICK_START, "--num-gpus", "3"], "IMS_PER_BATCH .* 3 workers"),
        (["--config-file", QUICK_START, "--num-gpus", "0"], "--num-gpus 0"),
        (
            ["--config-file", QUICK_START, "SOLVER.REFERENCE_WORLD_SIZE", "3"],
            "SOLVER.IMS_PER_BATCH 4 .* SOLVER.REFERENCE_WORLD_SIZE 3",
        ),
        (["--config-file", QUICK_START, "SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED"),
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


def test_faulty_yaml_is_named(fails, tmp_path):
    for i, text in enumerate(("MODEL: [", "!!python/object/apply:os.abort []", "- 1", "A: 1")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(text)
        assert str(path) in fails("--config-file", str(path))


TAG = "!!python/object/apply:os.system ['touch {ran}']"


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a": f"SEED: {TAG}"}, "a.yaml is not valid: .*os.system"),
        (
            {"a": "_BASE_: b.yaml", "b": "_BASE_: c.yaml", "c": f"SEED: {TAG}"},
            "c.yaml is not valid",
        ),
        ({"a": "_BASE_: [b.yaml, c.yaml]", "b": "SEED: 1", "c": f"- {TAG}"}, "c.yaml is not valid"),
        (
            {"a": "_BASE_: http://127.0.0.1:1/b.yaml"},
            "a.yaml has the _BASE_ http://.* no local file",
        ),
        ({"a": "_BASE_: {b: c}"}, "a.yaml has the _BASE_ .* no local file"),
        ({"a": "_BASE_: a.yaml"}, "a.yaml: its _BASE_ leads to more than 100 files"),
        ({"a": "_BASE_: [c.yaml, b.yaml]", "b": "_BASE_: a.yaml", "c": "SEED: 1"}, "more than 100"),
        (
            {"a": "_BASE_: [b.yaml, gone.yaml]", "b": "A: 1"},
            "a.yaml has the _BASE_ gone.yaml, .* no",
        ),
        ({"a": "_BASE_: /dev/zero"}, "a.yaml has the _BASE_ /dev/zero, .* no local file"),
        ({"a": "_BASE_: b.yaml", "b": "- 1"}, "b.yaml does not consist of KEY: VALUE"),
        ({"a": ""}, "a.yaml does not consist of KEY: VALUE"),
        ({"a": "_BASE_"}, "a.yaml does not consist of KEY: VALUE"),
        ({"a": "[" * 50_000}, "a.yaml: maximum recursion depth"),
        ({"a": "#" * 2_000_000}, "a.yaml is larger than"),
        ({"a": "A: &a {B: 1}\nC: {<<: [" + "*a, " * 11 + "]}"}, "a.yaml has 11 aliases"),
        ({"a": "SEED: \0"}, "a.yaml is not valid"),
        ({"a": "MODEL: {LOAD_PROPOSALS: True}"}, "MODEL.LOAD_PROPOSALS .* pickles"),
    ],
)
def test_config_from_others_is_refused_and_runs_no_code(fails, tmp_path, files, message):
    for name, text in files.items():
        text = text.replace("{ran}", str(tmp_path / "ran"))
        (tmp_path / f"{name}.yaml").write_text(text)
    error = fails("--config-file", str(tmp_path / "a.yaml"))
    assert re.search(message, error), error
    assert not (tmp_path / "ran").exists()


def test_config_that_a_run_has_written_is_read(tmp_path):
    cfg = load_config(COCO_CONFIG, ["SEED", "3"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert "*id" in cfg.dump()
    read = load_config(str(tmp_path / "config.yaml"), [])
    assert yaml.safe_load(read.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize(
    "opts",
    [
        ["SEED", "__import__('os').mkdir('ran')"],
        ["OUTPUT_DIR.x", "__import__('os').mkdir('ran')"],
        ["MODEL", "None"],
        ["SEED", "-" * 100_000 + "1"],
        ["SEED", "(" * 300],
        ["_BASE_", "x.yaml"],
        ["", ""],
        ["MODEL.LOAD_PROPOSALS", "True"],
    ],
)
def test_value_of_the_command_line_is_refused_and_runs_no_code(fails, tmp_path, opts):
    assert len(fails("--config-file", QUICK_START, *opts)) < 1000
    assert not (tmp_path / "ran").exists()


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
        assert f"{name} does not exist: {missing}" in error


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
    monkeypatch.setattr(train_net, "launch", lambda main, cfg, args: launched.append(args.num_gpus))
    monkeypatch.setattr(sys, "argv", ["train_net.py", *command, "INPUT.ON_BAD_IMAGE", "skip"])
    train_net.invoke_main()
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
    assert f"{path}: annotation id 6 has no 'segmentation'" in error and "MODEL.MASK_ON" in error


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
