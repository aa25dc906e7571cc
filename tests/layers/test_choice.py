"""
Which operators run: with the kernels on the GPU where there is one, otherwise under Triton's
interpreter (conftest.py).
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import logger as detectron2_logger
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gnws_d2 import model_zoo
from gnws_d2.layers import GroupNorm, WSConv2d, group_norm, standardize_weight
from gnws_d2.layers.kernels import choice
from gnws_d2.layers.kernels import group_norm as gn
from gnws_d2.layers.kernels import weight_standardization as ws
from gnws_d2.utils.errors import UserError

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Nothing is checked or logged yet, and CPU tensors pass for tensors on a GPU."""
    choice.find_failure.cache_clear()
    monkeypatch.setattr(choice, "is_eager_on_gpu", lambda x: True)
    monkeypatch.setattr(choice, "has_triton", lambda device: True)
    detectron2_logger._LOG_COUNTER.clear()
    yield
    choice.find_failure.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that have run."""
    names = []

    def count(name, original):
        return lambda *args: names.append(name) or original(*args)

    for module, name in ((gn, "group_norm"), (ws, "standardize")):
        monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    return names


def arguments(*shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, device=DEVICE)
    return x, shape[1] // 2, *torch.randn(2, shape[1], device=DEVICE)


@pytest.mark.parametrize("name", model_zoo.names()[:8])  # one of each network
def test_kernels_run_in_every_layer_of_the_model_zoo(name, monkeypatch):
    monkeypatch.setattr(choice, "find_difference", lambda *_: "")
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        modules = list(build_model(cfg).modules())
    norms = [m for m in modules if isinstance(m, GroupNorm)]
    convs = [m for m in modules if isinstance(m, WSConv2d)]
    assert len(norms) >= 61 and len(convs) >= 61
    for norm in norms:
        x = torch.empty(1, norm.num_channels, 4, 4, device="meta")
        assert choice.find_kernels("group_norm", "auto", x, x.dtype, norm.num_groups) is gn
    for conv in convs:
        name = "weight_standardization"
        assert choice.find_kernels(name, "auto", conv.weight, torch.float16) is ws


@pytest.mark.parametrize("mode, number", [("auto", 1), ("triton", 1), ("torch", 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_chosen_operators_run_with_the_same_numbers(calls, mode, number, grad):
    x, groups, weight, bias = arguments(2, 8, 6, 6)
    choice.find_failure(x.dtype, x.device)
    calls.clear()
    residual = torch.randn_like(x)
    leaves = [t.requires_grad_(grad) for t in (x, weight, bias, residual)]
    y = group_norm(x, groups, weight, bias, residual=residual, relu=True, kernels=mode)
    expected = F.relu(F.group_norm(x, groups, weight, bias) + residual)
    assert len(calls) == number
    torch.testing.assert_close(y, expected)
    if grad:
        grads = [torch.autograd.grad(out, leaves, torch.ones_like(x)) for out in (y, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_standardization_runs_the_kernels(dtype, calls):
    """Also into half precision, as in autocast."""
    weight = torch.randn(4, 3, 3, 3, device=DEVICE, requires_grad=True)
    standardize_weight(weight, dtype=dtype)  # checked at first use
    calls.clear()
    outs = [standardize_weight(weight, dtype=dtype, kernels=mode) for mode in ("auto", "torch")]
    assert calls == ["standardize"]
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(*outs, **tolerance)
    g = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(y, weight, g)[0] for y in outs]
    torch.testing.assert_close(*grads, **tolerance)


def test_kernels_are_checked_once_for_each_dtype(calls):
    x = arguments(2, 8, 4, 4)[0]
    numbers = []
    for dtype in (torch.float32, torch.float32, torch.float16, torch.float16):
        assert choice.find_kernels("group_norm", "auto", x.to(dtype), dtype, 4) is gn
        assert choice.find_failure(dtype, DEVICE) == ""
        numbers.append(len(calls))
    assert 0 < numbers[0] == numbers[1] < numbers[2] == numbers[3]
    assert set(calls) == {"group_norm", "standardize"}


def wrong_output(y):
    return y + 0.01 * y.detach()


def wrong_gradient(y):
    y.register_hook(lambda grad: grad * 1.01)
    return y


def no_number(y):
    return y * float("nan")


def failing(y):
    raise RuntimeError("out of\nregisters")


@pytest.mark.parametrize(
    "change, reason",
    [
        (wrong_output, "of the largest value in group_norm of (3, 64, 7, 5) in 32 groups"),
        (wrong_gradient, "of the largest value in group_norm of (3, 64, 7, 5) in 32 groups"),
        (no_number, "nan of the largest value in group_norm"),
        (failing, "RuntimeError: out of registers"),
    ],
)
def test_kernels_that_fail_the_check_never_run_and_are_reported_once(
    change, reason, monkeypatch, caplog
):
    monkeypatch.setattr(gn, "group_norm", lambda *args, f=gn.group_norm: change(f(*args)))
    x, groups, weight, bias = arguments(2, 8, 4, 4)
    for _ in range(3):
        y = group_norm(x, groups, weight, bias)
        torch.testing.assert_close(y, F.group_norm(x, groups, weight, bias))
        standardize_weight(torch.randn(4, 3, 3, 3, device=DEVICE))
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "the kernels fail their check in torch.float32 (" in text
    assert reason in text and "please report this" in text
    with pytest.raises(UserError, match=r'KERNELS is "triton", but .*: set it to "auto"\.$'):
        group_norm(x, groups, weight, bias, kernels="triton")


@pytest.mark.parametrize("weight_dtype", FLOATS[:2], ids=str)
def test_wrong_standardization_is_found(weight_dtype, monkeypatch):
    """In half precision, also of the float32 weights that autocast keeps."""

    def wrong_backward(grad, out, std, eps, dtype, right=ws.standardize_backward):
        return right(grad, out, std, eps, dtype) * (1.01 if dtype == weight_dtype else 1)

    monkeypatch.setattr(ws, "standardize_backward", wrong_backward)
    assert "in weight_standardization of" in choice.find_failure(torch.float16, DEVICE)


@pytest.mark.parametrize(
    "shape, dtype, groups, has_triton, expected",
    [
        ((2, 12, 4, 4), torch.float32, 4, True, "no GroupNorm kernel for groups of 3 channels"),
        ((2, 8, 4, 4), torch.float64, 4, True, "there are no kernels for torch.float64"),
        ((2, 8, 4, 4), torch.float32, 4, False, "Triton is not installed or does not support"),
    ],
)
def test_where_kernels_cannot_run(shape, dtype, groups, has_triton, expected, monkeypatch, caplog):
    """PyTorch's own operators run, with one warning; "triton" is an error."""
    monkeypatch.setattr(choice, "has_triton", lambda device: has_triton)
    x, weight, bias = (t.to(DEVICE, dtype) for t in (torch.randn(shape), *torch.randn(2, shape[1])))
    for _ in range(2):
        y = group_norm(x, groups, weight, bias)
        torch.testing.assert_close(y, F.group_norm(x, groups, weight, bias))
    (record,) = caplog.records
    assert expected in record.getMessage()
    with pytest.raises(UserError, match=expected):
        group_norm(x, groups, weight, bias, kernels="triton")


def test_what_is_not_eager_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    x = SimpleNamespace(is_cuda=True, numel=lambda: 1)
    assert choice.is_eager_on_gpu(x)
    assert not choice.is_eager_on_gpu(torch.ones(1))
    assert not choice.is_eager_on_gpu(SimpleNamespace(is_cuda=True, numel=lambda: 0))
    for module, function in ((torch.jit, "is_tracing"), (torch.compiler, "is_compiling")):
        with monkeypatch.context() as context:
            context.setattr(module, function, lambda: True)
            assert not choice.is_eager_on_gpu(x)


def test_first_use_under_activation_checkpointing_and_autocast(calls):
    """Hooks on saved tensors, and autocast, do not reach the check."""
    x, groups, weight, bias = arguments(2, 8, 6, 6)
    x.requires_grad_()

    def forward(x):
        return group_norm(x * 2, groups, weight, bias, relu=True)

    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = checkpoint(forward, x, use_reentrant=False)
    assert len(calls) > 2  # of the check, and the operator
    expected = F.relu(F.group_norm(x * 2, groups, weight, bias))
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(out, x, torch.ones_like(x))[0] for out in (y, expected)]
    torch.testing.assert_close(*grads)
