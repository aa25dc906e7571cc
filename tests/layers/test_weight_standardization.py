import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch.nn import functional as F

from gnws_d2.layers import GroupNorm, WSConv2d, standardize_weight

SHAPES = [(64, 3, 7, 7), (256, 64, 1, 1), (128, 4, 3, 3), (512, 2048, 1, 1), (8, 1, 3, 3)]


def formula(weight, eps=1e-5):
    """Qiao et al. 2019 (arXiv:1903.10520), as MMCV's ConvWS2d has it, in float64."""
    weight = weight.double()
    flat = weight.reshape(weight.shape[0], -1)
    n = flat.shape[1]
    mean = flat.sum(1) / n
    std = (((flat - mean[:, None]) ** 2).sum(1) / (n - 1)) ** 0.5
    return (weight - mean[:, None, None, None]) / (std[:, None, None, None] + eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale, offset", [(0.05, 0), (1e-4, 0), (0.05, 1), (1, 100)])
def test_float32_agrees_with_the_formula_in_float64(shape, scale, offset):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * scale + offset).requires_grad_()
    out, expected = standardize_weight(weight), formula(weight)
    assert (out - expected).norm() <= 1e-6 * expected.norm()
    grad_output = torch.randn(shape)
    (grad,) = torch.autograd.grad(out, weight, grad_output)
    double = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formula(double), double, grad_output.double())
    assert (grad - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("shape", [(4, 64, 3, 3), (4, 1, 1, 1)], ids=["equal", "single value"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3])
def test_filter_of_equal_values_gives_zeros_and_finite_gradients(shape, value):
    weight = torch.full(shape, value, requires_grad=True)
    out = standardize_weight(weight)
    out.backward(torch.randn(shape))
    assert out.abs().max() == 0
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_have_float32_statistics(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(64, 512, 3, 3) * 0.01 + 0.05).to(dtype)
    out = standardize_weight(weight)
    assert out.dtype == dtype
    step = 2**-24  # of float16 near zero
    torch.testing.assert_close(
        out, formula(weight).to(dtype), rtol=torch.finfo(dtype).eps, atol=2 * step
    )


def make_conv(cls=WSConv2d):
    torch.manual_seed(0)
    conv = cls(
        32, 64, 3, stride=2, padding=1, groups=4, bias=False,
        norm=get_norm("GN", 64), activation=nn.ReLU(),
    )  # fmt: skip
    conv.norm.__class__ = GroupNorm
    nn.init.normal_(conv.norm.weight)
    return conv


def test_is_a_conv2d_with_standardized_weight():
    conv, plain = make_conv(), make_conv(Conv2d)
    assert conv.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 32, 9, 9)
    assert not torch.allclose(conv(x), plain(x))
    plain.weight.data = formula(conv.weight).float()
    for conv.kernels in ("auto", "reference"):
        torch.testing.assert_close(conv(x), plain(x))
    with torch.no_grad():  # nothing is kept from the last forward
        conv.eval().weight.data = torch.randn_like(conv.weight)
        plain.weight.data = formula(conv.weight).float()
        torch.testing.assert_close(conv(x), plain(x))


def test_autocast_standardizes_in_float32_and_convolves_in_bfloat16():
    conv = make_conv()
    conv.norm = conv.activation = None
    x = torch.randn(2, 32, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    weight = formula(conv.weight).float().bfloat16()
    torch.testing.assert_close(
        out, F.conv2d(x.bfloat16(), weight, stride=2, padding=1, groups=4), rtol=0, atol=0
    )


def test_trace_passes_its_check_and_has_gradients():
    """The check of torch.jit.trace compares with a second trace, without gradients."""
    conv, x = make_conv(), torch.randn(2, 32, 9, 9)
    traced = torch.jit.trace(conv, x)
    x = torch.randn(3, 32, 7, 7)
    torch.testing.assert_close(traced(x), conv(x))
    grads = torch.autograd.grad(traced(x).sum(), list(conv.parameters()))
    expected = torch.autograd.grad(conv(x).sum(), list(conv.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_compiles_without_graph_breaks(mode):
    conv, x = make_conv().train(mode == "training"), torch.randn(2, 32, 9, 9)
    with torch.set_grad_enabled(mode == "training"):
        compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-4)


def test_empty_input_gives_empty_output_and_zero_gradients():
    conv = make_conv()
    out = conv(torch.zeros(0, 32, 9, 9))
    assert out.shape == (0, 64, 5, 5)
    out.sum().backward()
    assert all((p.grad == 0).all() for p in conv.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_keeps_one_copy_of_the_standardized_weight(autocast):
    """It is shared with the convolution, and in autocast half as large. The stds are small."""
    conv = make_conv()
    conv.norm = conv.activation = None
    x = torch.randn(2, 32, 9, 9)
    kept = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = conv(x)
    large = [t for t in kept.values() if t.numel() > conv.out_channels and t.shape != x.shape]
    assert [t.shape for t in large] == [conv.weight.shape]
    assert large[0].data_ptr() != conv.weight.data_ptr()
    assert large[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    out.sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_meta_device_gives_the_shape():
    conv = make_conv().to("meta")
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            assert conv.train(mode)(torch.zeros(2, 32, 9, 9, device="meta")).shape == (2, 64, 5, 5)
