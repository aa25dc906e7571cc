"""tools/reproduce_table.py, on the built-in data and with seeded weights for its three classes."""

import json
import runpy
import sys

import pytest
import torch
from conftest import ROOT, mmdet_state

from gnws_d2 import model_zoo
from gnws_d2.data.shapes import generate_shapes

TOOL = str(ROOT / "tools" / "reproduce_table.py")
MASK, BOX = "mask_rcnn_R50_gnws_2x", "faster_rcnn_R50_gnws_1x"
OPTS = [
    "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TEST", "64",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "30", "DATALOADER.NUM_WORKERS", "0",
    "DATASETS.TEST", "('shapes_val',)", "MODEL.WEIGHTS", "weights.pth",
]  # fmt: skip


@pytest.fixture
def reproduce(tmp_path, monkeypatch, shapes_root):
    """Evaluate models whose published AP is what the test says. Return the exit status."""
    state = mmdet_state(MASK)
    for key, value in state.items():
        classes = 4 if "fc_cls" in key else 12 if "fc_reg" in key else 3
        if any(name in key for name in ("fc_cls", "fc_reg", "conv_logits")):
            state[key] = value[:classes].clone()
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "weights.pth")
    generate_shapes(str(shapes_root / "shapes_val"), 4, 1)
    monkeypatch.chdir(tmp_path)

    def reproduce(*names, box_ap, mask_ap):
        published = {"box_ap": box_ap, "mask_ap": mask_ap}
        table = [row | published for row in model_zoo.table() if row["name"] in names]
        monkeypatch.setattr(model_zoo, "table", lambda: table)
        monkeypatch.setattr(sys, "argv", [TOOL, "--models", *names, "--opts", *OPTS])
        try:
            runpy.run_path(TOOL, run_name="__main__")
        except SystemExit as e:
            return e.code
        return 0

    return reproduce


def test_ap_within_the_tolerance_is_reproduced_and_another_is_not(reproduce):
    assert reproduce(MASK, box_ap=0.9, mask_ap=0.0) == 0
    assert json.loads(open(f"output/table/{MASK}/inference/coco_instances_results.json").read())
    assert MASK in reproduce(MASK, box_ap=0.9, mask_ap=20.0)


def test_model_that_cannot_be_evaluated_is_not_reproduced(reproduce):
    error = reproduce(BOX, box_ap=0.0, mask_ap=None)  # the weights have a mask head
    assert error.startswith(f"Not reproduced: {BOX}.")
