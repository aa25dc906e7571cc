import copy

import torch
from detectron2.layers import Conv2d, DeformConv, ShapeSpec, get_norm
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from test_fuse import BLOCKS
from test_weight_standardization import formula
from torch import nn
from torch.nn import functional as F

from gnws_d2.layers import GroupNorm, WSConv2d, convert_ws_conv, fold_ws_conv


def test_convert_leaves_convolutions_without_norm_and_deformable_ones():
    model = nn.Sequential(
        Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        DeformConv(32, 32, 3, norm=get_norm("GN", 32)),
        Conv2d(32, 32, 3, norm=get_norm("FrozenBN", 32)),
        Conv2d(32, 32, 3, norm=get_norm(lambda channels: nn.InstanceNorm2d(channels), 32)),
    )
    types = [type(m) for m in model]
    assert convert_ws_conv(model) is model
    assert [type(m) for m in model] == [*types[:-1], WSConv2d]


def test_convert_warns_where_there_is_nothing_to_convert(caplog):
    """As in Detectron2's configs with frozen BatchNorm."""
    convert_ws_conv(nn.Sequential(Conv2d(32, 32, 3, norm=get_norm("FrozenBN", 32))))
    assert '"GN" in the NORM keys' in caplog.text


def test_convert_reaches_the_convolutions_of_retinanets_head():
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


def test_fold_leaves_detectron2s_own_modules():
    torch.manual_seed(0)
    plain = nn.Sequential(*(make("GN") for make, _ in BLOCKS.values()))
    model = convert_ws_conv(copy.deepcopy(plain))
    x = torch.randn(1, 3, 64, 64)
    outputs = [model[0](x), model[2](model[0](x))]
    assert fold_ws_conv(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    folded = [model[0](x), model[2](model[0](x))]
    torch.testing.assert_close(folded, outputs)


def test_reference_kernels_leave_norms_and_blocks_as_they_are():
    block = convert_ws_conv(BottleneckBlock(32, 64, bottleneck_channels=32, norm="GN"), "reference")
    assert type(block) is BottleneckBlock and type(block.conv1.norm) is nn.GroupNorm
    convs = [m for m in block.modules() if isinstance(m, WSConv2d)]
    assert len(convs) == 4 and all(m.kernels == "reference" for m in convs)
