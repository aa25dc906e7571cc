import copy

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from test_weight_standardization import formula
from torch import nn

from gnws_d2.layers import convert_ws_conv

BLOCKS = {
    "stem": (lambda norm: BasicStem(3, 32, norm), 3),
    "basic": (lambda norm: BasicBlock(32, 64, stride=2, norm=norm), 32),
    "basic, identity": (lambda norm: BasicBlock(32, 32, norm=norm), 32),
    "bottleneck": (
        lambda norm: BottleneckBlock(32, 64, bottleneck_channels=32, stride=2, norm=norm), 32
    ),
    "bottleneck, identity": (
        lambda norm: BottleneckBlock(64, 64, bottleneck_channels=32, num_groups=2, norm=norm), 64
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, channels", BLOCKS.values(), ids=BLOCKS)
def test_fused_blocks_are_detectron2s_with_standardized_weights(make, channels):
    """In float64, outputs and all gradients."""
    torch.manual_seed(0)
    plain = make("GN").double()
    for p in plain.parameters():
        nn.init.normal_(p)
    fused = convert_ws_conv(copy.deepcopy(plain))
    assert type(fused).__name__ == f"GNWS{type(plain).__name__}"
    assert list(fused.state_dict()) == list(plain.state_dict())

    x = torch.randn(2, channels, 16, 12, dtype=torch.float64, requires_grad=True)
    weights = dict(plain.named_parameters())
    standardized = {n: formula(w) if w.dim() == 4 else w for n, w in weights.items()}
    expected = torch.func.functional_call(plain, standardized, x)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [x, *weights.values()], grad)
    out = fused(x)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out, [x, *fused.parameters()], grad)
    for actual, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(actual, expected_grad)
