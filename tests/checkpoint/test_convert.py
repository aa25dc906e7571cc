import re

import pytest
import torch
from conftest import backbone_state, build, mmdet_state

from gnws_d2 import model_zoo
from gnws_d2.checkpoint import convert_to_detectron2, convert_to_mmdet
from gnws_d2.utils.errors import UserError

NAMES = model_zoo.names()[:8]  # one of each network
R50 = NAMES[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_mmdetection_has_its_place(name):
    state = mmdet_state(name)
    given = {f"module.{key}": value for key, value in state.items()}  # of DDP
    given |= {f"ema_{key.replace('.', '_')}": value + 1 for key, value in state.items()}
    converted = convert_to_detectron2({"meta": {"epoch": 12}, "state_dict": given})["model"]
    model = build(name)
    assert {k: v.shape for k, v in converted.items()} == {
        k: p.shape for k, p in model.named_parameters()
    }
    back = convert_to_mmdet({"model": converted})["state_dict"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def imagenet_state(layout):
    """The backbone of R-50 in MMCV's layout or in the WS authors'."""
    state = backbone_state(R50)
    if layout == "MMCV":
        return state
    state = {"module." + re.sub(r"\bgn(\d)", r"bn\1", key): value for key, value in state.items()}
    fc = {"weight": torch.zeros(1000, 2048), "bias": torch.zeros(1000)}
    return state | {f"module.fc.{key}": value for key, value in fc.items()}


@pytest.mark.parametrize("layout", ["MMCV", "authors"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_imagenet_backbones_are_recognized(layout, wrapped):
    state = imagenet_state(layout)
    converted = convert_to_detectron2({"state_dict": state} if wrapped else state)
    backbone = build(R50).backbone.bottom_up
    assert {k: v.shape for k, v in converted["model"].items()} == {
        k: p.shape for k, p in backbone.named_parameters()
    }
    expected = imagenet_state("MMCV")["layer2.3.gn3.weight"]
    assert torch.equal(converted["model"]["res3.3.conv3.norm.weight"], expected)


def test_detectron2s_format_is_taken_as_it_is():
    checkpoint = {"model": build(R50).state_dict(), "iteration": 3}
    assert convert_to_detectron2(checkpoint) is checkpoint
    assert convert_to_detectron2(checkpoint["model"])["model"].keys() == checkpoint["model"].keys()


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ({"state_dict": {"bn1.running_mean": torch.zeros(3)}}, "BatchNorm"),
        ({"transformer.weight": torch.zeros(3)}, "transformer.weight.* no known model"),
        ({"epoch": 3}, "no state dict"),
        ([torch.zeros(3)], "no state dict"),
        (torch.zeros(3), "no state dict"),
        (None, "no state dict"),
        ({1: torch.ones(1)}, "no state dict"),
        ({"model": {"a": 3}}, "no state dict"),
        ({"model": {"a": [torch.zeros(3)]}}, "no state dict"),
        ({"model": {None: torch.ones(1)}}, "no state dict"),
        ({"backbone.layer1.0.conv1.weight": torch.ones(1), "\ud800": torch.ones(1)}, "no known"),
        ({f"backbone.layer{i}.0.gn1.b": torch.ones(1) for i in ("1", "9" * 5000)}, "no known"),
    ],
)
def test_other_content_is_refused(checkpoint, message):
    with pytest.raises(UserError, match=message):
        convert_to_detectron2(checkpoint)


def test_layers_without_a_counterpart_are_named():
    state = mmdet_state(R50) | {"roi_head.bbox_head.1.fc_cls.weight": torch.zeros(3)}
    with pytest.raises(UserError, match=r"parameter roi_head.bbox_head.1.fc_cls.*no known"):
        convert_to_detectron2({"state_dict": state})
    with pytest.raises(UserError, match="keypoint_head"):
        convert_to_mmdet({"model": {"roi_heads.keypoint_head.weight": torch.zeros(3)}})


def test_command_converts_there_and_back(tmp_path, gnws):
    there, back = tmp_path / "detectron2.pth", tmp_path / "mmdet.pth"
    given = tmp_path / "given.pth"
    state = mmdet_state(R50)
    torch.save({"meta": {}, "state_dict": state}, given)
    assert gnws("convert", given, there)[0] == 0
    assert gnws("convert", there, back, "--to", "mmdet")[0] == 0
    build(R50).load_state_dict(torch.load(there)["model"], strict=False)
    result = torch.load(back)["state_dict"]
    assert result.keys() == state.keys()
    assert all(torch.equal(result[key], state[key]) for key in state)

    given.write_text("{}")
    status, _, err = gnws("convert", given, there)
    assert status == 2 and f"{given} is damaged" in err
