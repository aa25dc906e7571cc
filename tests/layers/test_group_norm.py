import copy
import itertools

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch.nn import functional as F

from gnws_d2.layers import GroupNorm, group_norm
from gnws_d2.layers.group_norm import GNConv2d


@pytest.mark.parametrize(
    "residual, relu, channels_last", list(itertools.product([False, True], repeat=3))
)
def test_agrees_with_pytorch_in_float64(residual, relu, channels_last):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 9, 7)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x, *torch.randn(2, 64)] + ([torch.randn(2, 64, 9, 7)] if residual else [])
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = group_norm(*leaves[:1], 32, *leaves[1:3], 1e-5, *(leaves[3:] or [None]), relu)
    assert out.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )

    doubles = [t.double().requires_grad_() for t in inputs]
    expected = sum(doubles[3:], F.group_norm(doubles[0], 32, *doubles[1:3], 1e-5))
    expected = expected.relu() if relu else expected
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, leaves, inputs))  # none is modified
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, doubles, grad.double())):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_so_in_autocast_with_float32_statistics(dtype):
    torch.manual_seed(0)
    norm = GroupNorm(32, 64)
    # Squares of these overflow float16, and their sum loses all digits in bfloat16.
    x = (torch.randn(2, 64, 40, 40) * 300 + 1000).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x, relu=True)
    assert out.dtype == dtype
    expected = F.group_norm(x.double(), 32).relu()
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("activation", [None, nn.ReLU()], ids=["", "activation"])
@pytest.mark.parametrize("norm", ["GN", "BN", "", "fused GN"])
def test_convolution_is_detectron2s_followed_by_residual_and_relu(norm, activation):
    torch.manual_seed(0)
    plain = Conv2d(8, 32, 3, norm=get_norm(norm.split()[-1] if norm else "", 32),
                   activation=activation)  # fmt: skip
    conv = copy.deepcopy(plain)
    conv.__class__ = GNConv2d
    if norm == "fused GN":
        conv.norm.__class__ = GroupNorm
    x, residual = torch.randn(2, 8, 6, 6), torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(conv(x), plain(x))
    torch.testing.assert_close(conv(x, relu=True), plain(x).relu())
    torch.testing.assert_close(conv(x, residual), plain(x) + residual)
    torch.testing.assert_close(conv(x, residual, relu=True), (plain(x) + residual).relu())
