"""A config file is read without running code in it, and a mistake in it is named."""

import re

import pytest
import torch
import yaml
from conftest import ROOT
from detectron2.config import get_cfg

from gnws_d2 import model_zoo
from gnws_d2.config import add_gnws_config, choose_device, flatten_config, load_config
from gnws_d2.utils.errors import UserError

QUICK_START = str(ROOT / "configs" / "quick_start.yaml")
TAG = "!!python/object/apply:os.system ['touch {ran}']"


def fails(*args):
    with pytest.raises(UserError) as e:
        load_config(*args)
    return str(e.value)


def test_our_configs_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick_start").mkdir()  # a directory is not a config
    for name in ("configs/quick_start.yaml", "quick_start.yaml", "quick_start"):
        assert load_config(name, []) == load_config(QUICK_START, [])
    assert "does not exist" in fails("configs/gone.yaml", [])
    assert "does not exist" in fails("other/quick_start.yaml", [])
    assert model_zoo.get_config(QUICK_START).SEED == 1
    (tmp_path / "quick_start").rmdir()
    (tmp_path / "quick_start").write_text("SEED: 7")
    assert load_config("quick_start", []).SEED == 7


def test_add_gnws_config_is_all_that_reading_the_config_of_a_run_needs(tmp_path):
    run = load_config("mask_rcnn_R50_gnws_2x", ["SEED", "3", "DISTRIBUTED.TIMEOUT", "7"])
    (tmp_path / "config.yaml").write_text(run.dump())
    cfg = get_cfg()
    assert "GNWS" not in cfg.MODEL  # Detectron2's own defaults stay as they are
    add_gnws_config(cfg)
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(cfg.dump()) == yaml.safe_load(run.dump())
    assert load_config(str(tmp_path / "config.yaml"), []) == cfg


def test_config_of_an_earlier_run_is_read(tmp_path):
    run = yaml.safe_load(load_config("quick_start", []).dump())
    run["MODEL"]["GNWS"]["ZERO_INIT_RESIDUAL"] = False
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    for cfg in (
        load_config(str(tmp_path / "config.yaml"), []),
        load_config("quick_start", [], text=yaml.safe_dump(run)),
    ):
        assert cfg.SEED == 1 and cfg.MODEL.GNWS.SCRATCH_INIT is True


def test_datasets_of_the_command_line_are_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b', 'c')"]
    datasets = [["a", "a.json", "images"], ["b", "http://x/b.json", "/images"]]
    cfg = load_config(QUICK_START, names, datasets)
    recorded = (("a", f"{tmp_path}/a.json", f"{tmp_path}/images"), tuple(datasets[1]))
    assert cfg.DATASETS.COCO == recorded
    (tmp_path / "config.yaml").write_text(cfg.dump())
    monkeypatch.chdir("/")
    again = load_config(str(tmp_path / "config.yaml"), [], [["b", "/moved.json", "/images"]])
    moved = ("b", "/moved.json", "/images")
    assert tuple(map(tuple, again.DATASETS.COCO)) == (recorded[0], moved)


def test_dataset_that_no_key_names_is_an_error():
    error = fails(QUICK_START, [], [["mine", "a.json", "images"]])
    assert "--dataset mine is neither in DATASETS.TRAIN nor in DATASETS.TEST" in error
    assert "DATASETS.TRAIN \"('mine',)\"" in error


def test_cpu_is_chosen_where_there_is_no_gpu(monkeypatch, caplog):
    caplog.set_level("INFO")
    cfg = load_config("mask_rcnn_R50_gnws_2x", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose_device(cfg)
    assert cfg.MODEL.DEVICE == "cuda" and not caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choose_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu" and cfg.is_frozen()
    assert "PyTorch finds no GPU: MODEL.DEVICE is cpu." in caplog.text
    assert model_zoo.get_config("mask_rcnn_R50_gnws_2x").MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a": "MODEL: ["}, "a.yaml: while parsing"),
        ({"a": f"SEED: {TAG}"}, "a.yaml: could not determine a constructor .*os.system"),
        ({"a": "_BASE_: b.yaml", "b": "_BASE_: c.yaml", "c": f"SEED: {TAG}"}, "os.system"),
        ({"a": "_BASE_: {b: c}"}, "a.yaml: "),
        ({"a": "_BASE_: a.yaml"}, "a.yaml: maximum recursion depth"),
        ({"a": "_BASE_: gone.yaml"}, "gone.yaml"),
        ({"a": "_BASE_: b.yaml", "b": "- 1"}, "a.yaml: "),
        ({"a": ""}, "a.yaml: "),
        ({"a": "SEED: \0"}, "a.yaml: "),
        ({"a": "SEDE: 1"}, "a.yaml: there is no key SEDE, did you mean SEED.$"),
        ({"a": "MODEL: {LOAD_PROPOSALS: True}"}, "MODEL.LOAD_PROPOSALS .* pickles"),
    ],
)
def test_config_from_others_is_refused_and_runs_no_code(tmp_path, files, message):
    for name, text in files.items():
        text = text.replace("{ran}", str(tmp_path / "ran"))
        (tmp_path / f"{name}.yaml").write_text(text)
    error = fails(str(tmp_path / "a.yaml"), [])
    assert re.search(message, error), error
    assert not (tmp_path / "ran").exists()


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
def test_value_of_the_command_line_is_refused_and_runs_no_code(tmp_path, opts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(fails(QUICK_START, opts)) < 1000
    assert not (tmp_path / "ran").exists()


def test_page_of_the_config_keys_has_all_of_ours_with_their_defaults():
    cfg = get_cfg()
    add_gnws_config(cfg)
    stock = flatten_config(get_cfg())
    own = {key: value for key, value in flatten_config(cfg).items() if key not in stock}
    page = (ROOT / "docs" / "config.md").read_text()
    documented = dict(re.findall(r"^\| `([A-Z.\w]+)` \| (.*?) \|", page, re.MULTILINE))
    assert documented == {key: str(value) or '""' for key, value in own.items()}
