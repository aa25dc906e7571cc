import argparse
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import types
from collections import deque
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import backbone_state, build, mmdet_state
from detectron2.checkpoint import DetectionCheckpointer

from gnws_d2 import model_zoo
from gnws_d2.checkpoint import (
    GNWSCheckpointer,
    convert_to_detectron2,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from gnws_d2.checkpoint.checkpointer import describe
from gnws_d2.export import fold_model
from gnws_d2.utils.errors import UserError

FASTER, MASK = "faster_rcnn_R50_gnws_1x", "mask_rcnn_R50_gnws_2x"


@pytest.fixture
def save(tmp_path):
    def save(content, **kwargs):
        path = str(tmp_path / "given.pth")
        torch.save(content, path, **kwargs)
        return path

    return save


def test_classes_are_recorded_and_others_are_refused(tmp_path, caplog):
    classes = {3: "fig", 7: "date"}
    model = build(FASTER, 2)
    GNWSCheckpointer(model, str(tmp_path), classes=classes).save("model")
    path = str(tmp_path / "model.pth")
    checkpointer = GNWSCheckpointer(model, strict=True)
    checkpointer.load(path)
    assert checkpointer.classes == classes and list(checkpointer.classes) == [3, 7]
    GNWSCheckpointer(model, strict=True, classes={1: "fig", 2: "date"}).load(path)  # by name
    with pytest.raises(UserError, match=r"is for the classes fig, date, but .* date, fig, in this"):
        GNWSCheckpointer(model, strict=True, classes={1: "date", 2: "fig"}).load(path)
    fine_tuned = GNWSCheckpointer(model, classes={1: "nut", 2: "seed"})  # to start from
    fine_tuned.load(path)
    assert fine_tuned.classes == {1: "nut", 2: "seed"}
    GNWSCheckpointer(model, str(tmp_path)).save("old")
    assert "classes" not in torch.load(tmp_path / "old.pth")
    old = GNWSCheckpointer(model, strict=True, classes=classes)
    old.load(str(tmp_path / "old.pth"))
    assert old.classes == classes


@pytest.mark.parametrize(
    "given, built, seems, builds",
    [
        ("mask_rcnn_X50_32x4d_gnws_2x", MASK, "Mask R-CNN X-50-32x4d-FPN", "Mask R-CNN R-50-FPN"),
        (FASTER, MASK, "Faster R-CNN R-50-FPN with 80", "Mask R-CNN R-50-FPN with 80"),
        (MASK, FASTER, "Mask R-CNN R-50-FPN with 80", "Faster R-CNN R-50-FPN with 80"),
        (MASK, (MASK, 3), "Mask R-CNN R-50-FPN with 80", "Mask R-CNN R-50-FPN with 3"),
    ],
)
def test_other_network_is_an_error_that_says_which(save, given, built, seems, builds):
    path = save({"meta": {}, "state_dict": mmdet_state(given)})
    model = build(*built) if isinstance(built, tuple) else build(built)
    with pytest.raises(UserError) as e:
        GNWSCheckpointer(model, strict=True).load(path)
    message = str(e.value)
    assert f"{path} seems to be a {seems}" in message and f"builds a {builds}" in message
    assert "\n" not in message


def test_missing_parameter_is_named(save):
    state = mmdet_state(FASTER)
    del state["neck.fpn_convs.1.gn.bias"]
    path = save({"state_dict": state})
    for strict in (True, False):
        with pytest.raises(UserError, match=r"fpn_output3.norm.bias is missing \(1 parameters"):
            GNWSCheckpointer(build(FASTER), strict=strict).load(path)


def test_training_starts_from_a_backbone(save):
    state = backbone_state(FASTER)
    path, model = save(state), build(FASTER)
    head = model.roi_heads.box_head.conv1.weight.clone()
    GNWSCheckpointer(model).load(path)
    block = model.backbone.bottom_up.res4[2]
    assert torch.equal(block.conv2.weight, state["layer3.2.conv2.weight"])
    assert torch.equal(block.conv2.norm.bias, state["layer3.2.gn2.bias"])
    assert torch.equal(model.roi_heads.box_head.conv1.weight, head)
    with pytest.raises(UserError, match="seems to be an R-50 backbone"):
        GNWSCheckpointer(model, strict=True).load(path)
    path = save(backbone_state("faster_rcnn_X50_32x4d_gnws_1x"))
    with pytest.raises(UserError, match="seems to be an X-50-32x4d backbone"):
        GNWSCheckpointer(model).load(path)


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_that_shares_no_parameter_with_the_model_is_an_error(save, strict):
    path = save({"model": {"transformer.layer.weight": torch.ones(3, 3)}})
    with pytest.raises(UserError, match=f"{path} seems to be another network, but .* is missing"):
        GNWSCheckpointer(build(FASTER), strict=strict).load(path)


def test_fine_tuning_on_other_classes_keeps_new_predictors_and_says_so_in_one_line(save, caplog):
    path, model = save({"state_dict": mmdet_state(MASK)}), build(MASK, 3)
    predictor = model.roi_heads.mask_head.predictor.weight.clone()
    with caplog.at_level("INFO"):
        GNWSCheckpointer(model).load(path)
    assert torch.equal(model.roi_heads.mask_head.predictor.weight, predictor)
    about = [r.getMessage() for r in caplog.records if "predictor" in r.getMessage()]
    assert len(about) == 1 and "other classes" in about[0] and "cls_score" in about[0]
    expected = mmdet_state(MASK)["roi_head.mask_head.convs.0.conv.weight"]
    assert torch.equal(model.roi_heads.mask_head.mask_fcn1.weight, expected)


def test_plain_group_norm_checkpoint_warns_and_the_other_way_round(tmp_path, caplog):
    model = build(FASTER)
    plain, _ = fold_model(model, model_zoo.get_config(FASTER))
    GNWSCheckpointer(model, str(tmp_path)).save("gnws")
    GNWSCheckpointer(plain, str(tmp_path)).save("gn")
    for m, name in itertools.product((model, plain), ("gnws", "gn")):
        caplog.clear()
        GNWSCheckpointer(m, strict=True).load(str(tmp_path / f"{name}.pth"))
        warns = (m is model) != (name == "gnws")
        assert ("the predictions will be wrong" in caplog.text) == warns


def test_own_checkpoints_load_in_stock_detectron2(tmp_path, caplog):
    model, other = build(FASTER), build(FASTER)
    GNWSCheckpointer(model, str(tmp_path)).save("model")
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>Not found</html>", pickle.dumps({"model": {}})]
)
def test_file_that_is_not_a_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "given.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} is damaged, or not a .* a web page or a pickle"):
        load_checkpoint(str(path))


@pytest.mark.parametrize("form", [True, False, ".pkl", ".pyth", ""])
def test_code_in_a_checkpoint_is_not_run(save, tmp_path, form):
    """Whatever its format (PyTorch's zip files or not) and name; Detectron2 unpickles .pkl."""
    content = {"state_dict": _Malicious(tmp_path / "ran"), "__author__": "x"}
    if isinstance(form, bool):
        path = save(content, _use_new_zipfile_serialization=form)
    else:
        path = str(tmp_path / f"model{form}")
        Path(path).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=rf"{path} .*(would run posix.system|a pickle)"):
        GNWSCheckpointer(torch.nn.Linear(2, 2)).load(path)
    assert not (tmp_path / "ran").exists()


NAME = "backbone.bottom_up.a"


def test_tensor_that_claims_more_values_than_it_has_is_an_error(save):
    path = save({NAME: torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    number, absurd = b"M\xe8\x03", b"\x8a\x06" + (10**13).to_bytes(6, "little")
    content = Path(path).read_bytes()
    assert number in content
    Path(path).write_bytes(content.replace(number, absurd))
    with pytest.raises(UserError, match=path):
        load_checkpoint(path)


def test_values_that_are_not_finite_are_named(save):
    state = mmdet_state(FASTER)
    state["rpn_head.rpn_conv.bias"][7] = float("nan")
    with pytest.raises(UserError, match=r"not finite in proposal_generator.rpn_head.conv.bias"):
        load_checkpoint(save({"state_dict": state}))


def test_no_checkpoint_is_an_error_only_where_one_is_needed():
    GNWSCheckpointer(build(FASTER)).load("")
    with pytest.raises(UserError, match=r"MODEL.WEIGHTS is empty"):
        GNWSCheckpointer(build(FASTER), strict=True).load("")


def test_checkpoint_is_loaded_from_a_url_or_the_reason_is_one_sentence(
    server, save, tmp_path, monkeypatch
):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    server.files["model.pth"] = Path(save({"model": model.state_dict()})).read_bytes()
    GNWSCheckpointer(other, strict=True).load(f"{server.url}/model.pth")
    assert torch.equal(other.weight, model.weight)
    for url, reason in (
        ("http://127.0.0.1:9/absent.pth", "Connection refused"),
        (f"{server.url}/gone.pth", "404"),
        ("http://[::1/model.pth", "Invalid IPv6 URL"),
    ):
        with pytest.raises(UserError) as e:
            find_checkpoint(url)
        message = str(e.value)
        assert f"Cannot download the checkpoint {url}: " in message and reason in message
    for path in ("s4://model.pth", str(tmp_path / "gone.pth")):
        with pytest.raises(UserError, match=f"{path} does not exist"):
            find_checkpoint(path)


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    """A file that cannot grow stands for the disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "model.pth"
    save_checkpoint({"model": {"a": torch.zeros(3)}}, str(path))
    good = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"Cannot write {path}: File too large"):
            save_checkpoint({"model": {"a": torch.zeros(1_000_000)}}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"] and path.read_bytes() == good


@pytest.mark.parametrize("name", model_zoo.names()[:8])
def test_describe(name):
    row = next(row for row in model_zoo.table() if row["name"] == name)
    state = convert_to_detectron2({"state_dict": mmdet_state(name)})["model"]
    assert describe(state) == f"a {row['detector']} {row['backbone']} with 80 classes"


class Counter:
    """A stateful object that a checkpoint holds in addition to the model."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def checkpointer(directory, model=None):
    return GNWSCheckpointer(model or torch.nn.Linear(2, 2), str(directory), counter=Counter())


@pytest.fixture
def checkpoints(tmp_path):
    """A directory with three checkpoints, each a second older than the next."""
    writer = checkpointer(tmp_path)
    for i in range(3):
        writer.checkpointables["counter"].count = i
        writer.save(f"model_{i}", iteration=i)
        os.utime(tmp_path / f"model_{i}.pth", (i, i))
    return tmp_path


def resume(directory):
    reader = checkpointer(directory)
    iteration = reader.resume_or_load("", resume=True)["iteration"]
    assert reader.checkpointables["counter"].count == iteration
    return iteration


@pytest.mark.parametrize("fault", ["truncated", "empty", "zeros at the end", "gone"])
def test_resume_takes_the_last_whole_checkpoint(checkpoints, fault, caplog):
    assert resume(checkpoints) == 2
    last = checkpoints / "model_2.pth"
    data = last.read_bytes()
    if fault == "gone":
        last.unlink()
    else:
        half = len(data) // 2
        damaged = {"truncated": data[:half], "empty": b""}
        last.write_bytes(damaged.get(fault, data[:half] + bytes(len(data) - half)))
    assert resume(checkpoints) == 1
    assert str(last) in caplog.text and "Looking for the checkpoint before it" in caplog.text
    (checkpoints / "last_checkpoint").write_text("model_0.pth")
    assert resume(checkpoints) == 0
    with pytest.raises(UserError, match=r"weight has shape \[2, 2\], not \[3, 3\]"):
        checkpointer(checkpoints, torch.nn.Linear(3, 3)).resume_or_load("", resume=True)
    for path in checkpoints.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=f"All checkpoints in {checkpoints} are damaged"):
        resume(checkpoints)


def test_resume_with_other_classes_is_one_sentence_that_says_what_to_do(tmp_path):
    """To start training they may differ. To resume, the state of the optimizer has to fit."""
    built = {classes: build(FASTER, classes) for classes in (80, 3)}
    writer, reader = (
        GNWSCheckpointer(m, str(tmp_path), optimizer=torch.optim.SGD(m.parameters(), 0.1))
        for m in built.values()
    )
    writer.save("model_final", iteration=3)
    with pytest.raises(UserError) as e:
        reader.resume_or_load("", resume=True)
    message = str(e.value)
    assert "with 80 classes, but the config builds" in message and "with 3 classes" in message
    assert "start anew without --resume or in another OUTPUT_DIR" in message
    reader.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
    assert torch.equal(built[3].backbone.fpn_output3.weight, built[80].backbone.fpn_output3.weight)


KILLED = """
import os, signal, sys, torch
from gnws_d2.checkpoint import GNWSCheckpointer, checkpointer
save = torch.save
def half(data, f):
    save(data, f)
    f.flush()
    os.ftruncate(f.fileno(), f.tell() // 2)
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
GNWSCheckpointer(torch.nn.Linear(2, 2), sys.argv[1]).save(sys.argv[2], iteration=3)
"""


@pytest.mark.parametrize("name", ["model_2", "model_3"], ids=["over another", "new"])
def test_kill_while_writing_leaves_the_checkpoints_as_they_were(checkpoints, name):
    before = {p.name: p.read_bytes() for p in checkpoints.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(checkpoints), name])
    assert done.returncode == -signal.SIGKILL
    after = {p.name: p.read_bytes() for p in checkpoints.iterdir()}
    (part,) = set(after) - set(before)
    assert re.fullmatch(rf"{name}\.pth\.\w+\.part", part)
    assert {key: after[key] for key in before} == before
    assert resume(checkpoints) == 2


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_mmdetections_file_loads_whole(save, tmp_path, zip_format, monkeypatch):
    """The logs and options in it are not read: their classes need not be installed."""
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class HistoryBuffer:
        def __init__(self):
            self.history = np.zeros(3)

        def __reduce__(self):
            (tmp_path / "written").touch()
            return type(self), (), {"history": self.history}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging", "HistoryBuffer"
    sys.modules["mmengine.logging"].HistoryBuffer = HistoryBuffer
    state = mmdet_state(FASTER)
    content = {
        "state_dict": state,
        "meta": {"time": datetime(2024, 1, 1), "path": tmp_path, "best": np.float64(0.4)},
        "message_hub": [HistoryBuffer(), argparse.Namespace(a=1), deque([1])],
        "dtype": torch.float16,
    }
    content["meta"]["dataset_meta"] = {"classes": ("cat", "dog")}
    path = save(content, _use_new_zipfile_serialization=zip_format)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.delitem(sys.modules, name)
    expected = convert_to_detectron2({"state_dict": state})["model"]
    loaded = load_checkpoint(path)
    assert loaded["classes"] == {1: "cat", 2: "dog"}
    model = build(FASTER, 80)
    GNWSCheckpointer(model, strict=True).load(path)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
