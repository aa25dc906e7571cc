"""A config file is read without running code in it, and a mistake in it is named."""

import re

import pytest
import yaml
from conftest import ROOT

from gnws_d2.config import load_config
from gnws_d2.utils.errors import UserError

QUICK_START = str(ROOT / "configs" / "quick_start.yaml")
TAG = "!!python/object/apply:os.system ['touch {ran}']"


def fails(*args):
    with pytest.raises(UserError) as e:
        load_config(*args)
    return str(e.value)


def test_config_goes_by_its_name_in_the_zoo_too(tmp_path, monkeypatch):
    assert load_config("quick_start", []) == load_config(QUICK_START, [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick_start").write_text("SEED: 7")
    assert load_config("quick_start", []).SEED == 7


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
        ({"a": "_BASE_"}, "a.yaml: "),
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


def test_config_that_a_run_has_written_is_read(tmp_path):
    cfg = load_config("mask_rcnn_R50_gnws_2x", ["SEED", "3"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert "*id" in cfg.dump()
    read = load_config(str(tmp_path / "config.yaml"), [])
    assert yaml.safe_load(read.dump()) == yaml.safe_load(cfg.dump())


def test_config_of_an_earlier_version_is_read(tmp_path):
    text = "DISTRIBUTED: {LOST_TIMEOUT: 60, START_TIMEOUT: 600, TIMEOUT: 7}"
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(str(tmp_path / "config.yaml"), []).DISTRIBUTED.TIMEOUT == 7


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
