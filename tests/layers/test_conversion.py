import copy

import pytest
import torch
from conftest import retinanet_with_gn
from detectron2.layers import Conv2d, DeformConv, ShapeSpec, get_norm
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from test_blocks import BLOCKS
from test_weight_standardization import formula
from torch import nn
from torch.nn import functional as F

from gnws_d2.layers import GroupNorm, WSConv2d, convert_ws_conv, fold_for_inference
from gnws_d2.layers.group_norm import GNConv2d
from gnws_d2.layers.weight_standardization import standardize_weight_reference


def test_only_convolutions_with_a_group_norm_are_converted(caplog):
    """A model without any, as of Detectron2's configs with frozen BatchNorm, is warned of."""
    model = nn.Sequential(
        Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        Conv2d(32, 32, 3, norm=get_norm("FrozenBN", 32)),
        Conv2d(32, 32, 3, norm=get_norm("BN", 32)),
        Conv2d(32, 32, 3, norm=get_norm("GN", 32)),
    )
    types = [type(m) for m in model]
    assert convert_ws_conv(model) is model
    assert [type(m) for m in model] == [*types[:-1], WSConv2d] and not caplog.text
    convert_ws_conv(model[:-1])
    assert '"GN" in the NORM keys' in caplog.text


def test_conversion_leaves_deformable_convolutions():
    pytest.importorskip("detectron2._C")
    model = nn.Sequential(DeformConv(32, 32, 3, norm=get_norm("GN", 32)))
    assert type(convert_ws_conv(model)[0]) is DeformConv


@retinanet_with_gn
def test_conversion_reaches_the_convolutions_of_retinanets_head():
    """They are plain nn.Conv2d followed by a norm in an nn.Sequential."""
    torch.manual_seed(0)
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=32, stride=8)], num_classes=2, num_anchors=1,
        conv_dims=[32, 32], norm="GN",
    )  # fmt: skip
    names = list(head.state_dict())
    convert_ws_conv(head)
    assert [type(m) for m in head.bbox_subnet] == [WSConv2d, GroupNorm, nn.ReLU] * 2
    assert type(head.cls_score) is nn.Conv2d
    assert list(head.state_dict()) == names
    conv, x = head.bbox_subnet[0], torch.randn(1, 32, 8, 8)
    torch.testing.assert_close(
        conv(x), F.conv2d(x, formula(conv.weight).float(), conv.bias, padding=1),
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return nn.Sequential(*(make("GN") for make, _ in BLOCKS.values()))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_fold_for_inference_standardizes_the_weights_once(blocks, kernels):
    model = convert_ws_conv(blocks, kernels).eval()
    folded = copy.deepcopy(model)
    assert fold_for_inference(folded) is folded
    assert list(folded.state_dict()) == list(model.state_dict())
    assert not any(isinstance(m, WSConv2d) for m in folded.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = [model[0](x), model[2](model[0](x))]
        torch.testing.assert_close([folded[0](x), folded[2](folded[0](x))], expected)

    for plain, m in zip(folded.modules(), model.modules()):
        if isinstance(m, WSConv2d):
            assert type(plain) is GNConv2d
            assert torch.equal(plain.weight, standardize_weight_reference(m.weight))
    weights = [p.clone() for p in folded.parameters()]
    fold_for_inference(folded)
    assert all(map(torch.equal, folded.parameters(), weights))


def test_fold_standardizes_a_shared_weight_once():
    convs = nn.Sequential(*(Conv2d(8, 8, 3, norm=get_norm("GN", 32)) for _ in range(2)))
    convs[1].weight = convs[0].weight
    weight = convs[0].weight.detach().clone()
    for conv in fold_for_inference(convert_ws_conv(convs)):
        assert torch.equal(conv.weight, standardize_weight_reference(weight))


def test_fold_in_autocast_convolves_in_bfloat16():
    conv = convert_ws_conv(nn.Sequential(Conv2d(32, 32, 3, norm=get_norm("GN", 32)))).eval()
    x = torch.randn(1, 32, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = conv(x)
        out = fold_for_inference(conv)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_reference_kernels_leave_norms_and_blocks_as_they_are():
    block = convert_ws_conv(BottleneckBlock(32, 64, bottleneck_channels=32, norm="GN"), "reference")
    assert type(block) is BottleneckBlock and type(block.conv1.norm) is nn.GroupNorm
    convs = [m for m in block.modules() if isinstance(m, WSConv2d)]
    assert len(convs) == 4 and all(m.kernels == "reference" for m in convs)
