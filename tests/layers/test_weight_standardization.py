import copy

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.layers import Conv2d, DeformConv, ShapeSpec, get_norm
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn
from torch.nn import functional as F

from gnws_d2.layers import WSConv2d, convert_ws_conv, standardize_weight

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
    weight = torch.randn(shape) * scale + offset
    expected = formula(weight)
    assert (standardize_weight(weight) - expected).norm() <= 1e-6 * expected.norm()


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize_weight, weight)
    grad_output = torch.randn_like(weight)
    (expected,) = torch.autograd.grad(formula(weight), weight, grad_output)
    (grad,) = torch.autograd.grad(standardize_weight(weight), weight, grad_output)
    torch.testing.assert_close(grad, expected)


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
    torch.testing.assert_close(out, formula(weight).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def make_conv(cls=WSConv2d):
    torch.manual_seed(0)
    conv = cls(
        32, 64, 3, stride=2, padding=1, groups=4, bias=False,
        norm=get_norm("GN", 64), activation=nn.ReLU(),
    )  # fmt: skip
    nn.init.normal_(conv.norm.weight)
    return conv


def test_is_a_conv2d_with_standardized_weight():
    conv, plain = make_conv(), make_conv(Conv2d)
    assert conv.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 32, 9, 9)
    assert not torch.allclose(conv(x), plain(x))
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


def test_torchscript_and_compile_give_the_same():
    conv, x = make_conv(), torch.randn(2, 32, 9, 9)
    torch.testing.assert_close(torch.jit.script(conv)(x), conv(x))
    compiled = torch.compile(conv, fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-4)


def test_empty_input_gives_empty_output_and_zero_gradients():
    conv = make_conv()
    out = conv(torch.zeros(0, 32, 9, 9))
    assert out.shape == (0, 64, 5, 5)
    out.sum().backward()
    assert all((p.grad == 0).all() for p in conv.parameters())


def test_deepcopy_is_independent():
    conv, x = make_conv(), torch.randn(2, 32, 9, 9)
    clone = copy.deepcopy(conv)
    before = conv(x)
    torch.testing.assert_close(clone(x), before)
    nn.init.normal_(clone.weight)
    torch.testing.assert_close(conv(x), before)


def _ddp_worker(rank, init_file, gradient_file):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=2
    )
    conv = nn.parallel.DistributedDataParallel(make_conv())
    torch.manual_seed(1)
    conv(torch.randn(4, 32, 9, 9)[rank * 2 : rank * 2 + 2]).sum().backward()
    if rank == 0:
        torch.save([p.grad for p in conv.parameters()], gradient_file)
    torch.distributed.destroy_process_group()


def test_ddp_averages_gradients(tmp_path):
    mp.spawn(_ddp_worker, (tmp_path / "init", tmp_path / "gradients.pth"), nprocs=2)
    conv = make_conv()
    torch.manual_seed(1)
    (conv(torch.randn(4, 32, 9, 9)).sum() / 2).backward()
    for grad, p in zip(torch.load(tmp_path / "gradients.pth"), conv.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4)


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
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=32, stride=8)], num_classes=2, num_anchors=1,
        conv_dims=[32, 32], norm="GN",
    )  # fmt: skip
    names = list(head.state_dict())
    convert_ws_conv(head)
    assert [type(m) for m in head.bbox_subnet] == [WSConv2d, nn.GroupNorm, nn.ReLU] * 2
    assert type(head.cls_score) is nn.Conv2d
    assert list(head.state_dict()) == names
    conv, x = head.bbox_subnet[0], torch.randn(1, 32, 8, 8)
    torch.testing.assert_close(
        conv(x), F.conv2d(x, formula(conv.weight).float(), conv.bias, padding=1)
    )
