import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
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


def expected_output(conv, x):
    """Of a convolution of :func:`make_conv`, its weight standardized by the formula."""
    weight = formula(conv.weight).to(conv.weight.dtype)
    x = F.conv2d(x, weight, stride=2, padding=1, groups=4)
    return F.group_norm(x, 32, conv.norm.weight, conv.norm.bias).relu()


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


@pytest.mark.parametrize("change", ["new", "train", "eval"])
def test_torchscript_gives_the_same(change):
    conv, x = make_conv(), torch.randn(2, 32, 9, 9)
    if change != "new":
        conv.train(change == "train")
    torch.testing.assert_close(torch.jit.script(conv)(x), conv(x))


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


@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, lambda conv: pickle.loads(pickle.dumps(conv))],
    ids=["copy", "pickle"],
)
def test_copies_have_weights_of_their_own(copy_of):
    conv, x = make_conv().eval(), torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        before = conv(x)
        clone = copy_of(conv)
        torch.testing.assert_close(clone(x), before)
        nn.init.normal_(clone.weight)
        torch.testing.assert_close(clone(x), expected_output(clone, x))
        torch.testing.assert_close(conv(x), before)


def _ddp_worker(rank, init_file, result_file):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=2
    )
    conv = nn.parallel.DistributedDataParallel(make_conv())
    torch.manual_seed(1)
    x = torch.randn(4, 32, 9, 9)
    conv.eval()
    with torch.no_grad():
        conv(x)
    conv(x[rank * 2 : rank * 2 + 2]).sum().backward()
    torch.optim.SGD(conv.parameters(), lr=1).step()
    if rank == 0:
        with torch.no_grad():
            torch.save(([p.grad for p in conv.parameters()], conv(x)), result_file)
    torch.distributed.destroy_process_group()


def test_ddp_averages_gradients_and_sees_the_steps(tmp_path):
    mp.spawn(_ddp_worker, (tmp_path / "init", tmp_path / "result.pth"), nprocs=2)
    grads, out = torch.load(tmp_path / "result.pth")
    conv = make_conv()
    torch.manual_seed(1)
    x = torch.randn(4, 32, 9, 9)
    (conv(x).sum() / 2).backward()
    for grad, p in zip(grads, conv.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4)
    torch.optim.SGD(conv.parameters(), lr=1).step()
    torch.testing.assert_close(out, expected_output(conv, x), rtol=1e-4, atol=1e-4)


def test_float32_gradients_are_exact_to_1e6():
    torch.manual_seed(0)
    for shape in SHAPES:
        weight = (torch.randn(shape) * 0.05).requires_grad_()
        grad_output = torch.randn(shape)
        (grad,) = torch.autograd.grad(standardize_weight(weight), weight, grad_output)
        double = weight.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(formula(double), double, grad_output.double())
        assert (grad - expected).norm() <= 1e-6 * expected.norm()


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


def replace_data(conv):
    conv.weight.data = torch.randn_like(conv.weight)


def replace_parameter(conv):
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def edit_in_inference_mode(conv):
    with torch.inference_mode():
        conv.weight.normal_()


def load_other_weights(conv):
    state = {k: torch.randn_like(v) for k, v in conv.state_dict().items()}
    conv.load_state_dict(state)


def step(conv, make_optimizer):
    conv(torch.randn(2, 32, 9, 9)).square().sum().backward()
    make_optimizer(conv.parameters()).step()


class WritesThroughData(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad)


def train_and_eval(conv):
    conv.train()
    step(conv, lambda p: torch.optim.SGD(p, lr=1))
    conv.eval()


CHANGES = {
    "in-place edit": lambda conv: nn.init.normal_(conv.weight),
    "edit in inference mode": edit_in_inference_mode,
    "load_state_dict": load_other_weights,
    "SGD": lambda conv: step(conv, lambda p: torch.optim.SGD(p, lr=1)),
    "SGD, foreach": lambda conv: step(conv, lambda p: torch.optim.SGD(p, lr=1, foreach=True)),
    "Adam, fused": lambda conv: step(conv, lambda p: torch.optim.Adam(p, lr=1, fused=True)),
    "an optimizer that writes through .data": lambda conv: step(conv, WritesThroughData),
    "training and evaluation": train_and_eval,
    ".data written": lambda conv: conv.weight.data.normal_(),
    ".data replaced": replace_data,
    "parameter replaced": replace_parameter,
    "double()": lambda conv: conv.double(),
    "half() and back": lambda conv: conv.half().float(),
}


@pytest.mark.parametrize("inference_mode", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_evaluation_sees_every_change_of_the_weight(change, inference_mode):
    conv, x = make_conv().eval(), torch.randn(2, 32, 9, 9)
    context = torch.inference_mode if inference_mode else torch.no_grad
    with context():
        before = conv(x)
        torch.testing.assert_close(conv(x), before, rtol=0, atol=0)
    change(conv)
    x = x.to(conv.weight.dtype)
    with context():
        out = conv(x)
    torch.testing.assert_close(out, expected_output(conv, x), rtol=1e-4, atol=1e-4)
    assert (out - before).abs().max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_evaluation_follows_the_weight_to_a_gpu_and_back():
    conv, x = make_conv().eval(), torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        for device in ("cpu", "cuda", "cpu"):
            nn.init.normal_(conv.weight)
            out = conv.to(device)(x.to(device))
            torch.testing.assert_close(
                out, expected_output(conv, x.to(device)), rtol=1e-3, atol=1e-3
            )


def test_evaluation_with_gradients_has_gradients():
    conv, x = make_conv().eval(), torch.randn(2, 32, 9, 9)
    with torch.inference_mode():
        conv(x)
    conv(x).sum().backward()
    assert conv.weight.grad.abs().max() > 0


def test_autocast_and_float32_evaluation_do_not_mix():
    conv, x = make_conv().eval(), torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = conv(x)
            assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
            tolerance = 0.05 if enabled else 1e-5
            torch.testing.assert_close(
                out.float(), expected_output(conv, x), rtol=tolerance, atol=tolerance
            )


def test_reference_gives_the_same():
    conv, x = make_conv(), torch.randn(2, 32, 9, 9)
    out = conv(x)
    conv.kernels = "reference"
    torch.testing.assert_close(conv(x), out)


def test_meta_device_gives_the_shape():
    conv = make_conv().to("meta")
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            assert conv.train(mode)(torch.zeros(2, 32, 9, 9, device="meta")).shape == (2, 64, 5, 5)
