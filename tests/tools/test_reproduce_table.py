import hashlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import mmdet_state

from gnws_d2 import model_zoo
from gnws_d2.checkpoint import catalog

TOOL = str(Path(__file__).parent.parent.parent / "tools" / "reproduce_table.py")
NAMES = ["faster_rcnn_R50_gnws_1x", "mask_rcnn_R50_gnws_2x"]
OPTS = [
    "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "30", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capsys, shapes_root):
    """Run the tool on the built-in data with seeded weights for its three classes."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("gnws_d2.data.shapes._SPLITS", {"shapes_val": (4, 1)})
    urls = {}
    for name in NAMES:
        state = mmdet_state(name)
        for key, value in state.items():
            if "fc_cls" in key:
                state[key] = value[:4].clone()
            elif "fc_reg" in key:
                state[key] = value[:12].clone()
            elif "conv_logits" in key:
                state[key] = value[:3].clone()
        f = io.BytesIO()
        torch.save({"meta": {}, "state_dict": state}, f)
        path = tmp_path / f"{name}-{hashlib.sha256(f.getvalue()).hexdigest()[:8]}.pth"
        path.write_bytes(f.getvalue())
        urls[name] = f"file://{path}"
    urls["mask_rcnn_R101_gnws_2x"] = f"file://{tmp_path}/gone-12345678.pth"
    monkeypatch.setattr(catalog, "checkpoint_urls", lambda: urls)

    def reproduce(*args, opts=()):
        argv = [TOOL, "--output", str(tmp_path / "table"), *args, "--opts", *OPTS, *opts]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as e:
            runpy.run_path(TOOL, run_name="__main__")
        out, err = capsys.readouterr()
        rows = []
        if (tmp_path / "table" / "table.json").exists():
            rows = json.loads((tmp_path / "table" / "table.json").read_text())
            assert (tmp_path / "table" / "table.md").read_text() in out
        return e.value.code, rows, out, err

    return reproduce


def test_table_and_exit_status_say_whether_ap_agrees(reproduce, monkeypatch):
    status, rows, out, _ = reproduce("--models", *NAMES, "--dataset", "shapes_val")
    assert status == 1 and out.count("off by > 0.1") == 2
    assert [row["name"] for row in rows] == NAMES
    assert [{k for k in row if k.endswith(" AP")} for row in rows] == [
        {"box AP"},
        {"box AP", "mask AP"},
    ]

    table = model_zoo.table()
    for row, published in ((rows[0], table[0]), (rows[1], table[4])):
        published["box_ap"] = row["box AP"] + 0.05
        published["mask_ap"] = row.get("mask AP")
    table[4]["mask_ap"] += 0.2
    monkeypatch.setattr(model_zoo, "table", lambda: table)
    status, _, out, _ = reproduce("--models", NAMES[0], "--dataset", "shapes_val")
    assert status == 0 and "off by" not in out and out.count("-0.05") == 1
    status, _, out, _ = reproduce("--models", NAMES[1], "--dataset", "shapes_val")
    assert status == 1 and out.count("off by > 0.1") == 1 and "-0.05" in out and "-0.20" in out


def test_missing_weights_and_data_are_shown_in_their_row(reproduce):
    status, rows, out, _ = reproduce(
        "--models", "mask_rcnn_R101_gnws_2x", "--dataset", "shapes_val"
    )
    assert status == 0 and "Cannot download" in rows[0]["result"] and "gone-12345678" in out
    status, rows, out, _ = reproduce("--models", NAMES[0])
    assert status == 0 and "coco_2017_val does not exist" in rows[0]["result"]


def test_mistakes_are_named(reproduce):
    status, _, _, err = reproduce("--models", "mask_rcnn_R52")
    assert status == 2 and "--models mask_rcnn_R52" in err
    status, _, _, err = reproduce("--dataset", "a", "b")
    assert status == 2 and "--dataset takes" in err
    status, _, _, err = reproduce("--output", TOOL)
    assert status == 2 and f"Cannot write to --output {TOOL}: File exists." in err


def test_nan_is_not_reproduced(reproduce, monkeypatch):
    nan = {"bbox": {"AP": float("nan")}}
    monkeypatch.setattr("gnws_d2.engine.Trainer.test", lambda *_: nan)
    status, rows, _, _ = reproduce("--models", NAMES[0], "--dataset", "shapes_val")
    assert status == 1 and rows[0]["result"] == "off by > 0.1"
