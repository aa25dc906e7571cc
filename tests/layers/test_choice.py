"""
The choice of operators, with kernels made up here on the CPU, and with ours on the GPU where there
is one, otherwise under Triton's interpreter (conftest.py).
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

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")  # of Triton
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Nothing is checked or logged yet, and CPU tensors pass for tensors on a GPU."""
    monkeypatch.setattr(choice, "_failures", {})
    monkeypatch.setattr(choice, "is_eager_on_gpu", lambda x: True)
    monkeypatch.setattr(choice, "has_triton", lambda device: True)
    detectron2_logger._LOG_COUNTER.clear()


@pytest.fixture
def kernels(monkeypatch):
    """Kernels of GroupNorm that are right, whose `change` a test sets; their calls are counted."""

    def run(x, num_groups, weight, bias, eps, residual, relu):
        fake.calls += 1
        y = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
        y = y if residual is None else y + residual
        return fake.change(y.relu() if relu else y)

    fake = SimpleNamespace(group_norm=run, unsupported_reason=lambda *_: "", calls=0)
    fake.change = lambda y: y
    monkeypatch.setattr(choice, "_import", lambda name: fake)
    return fake


def arguments(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*shape).to(dtype)
    return x, shape[1] // 2, *torch.randn(2, shape[1])


# The tables of docs/performance.md, measured on an H100: Mask R-CNN R-50, images of 800 x 1344.
MAPS = [
    (64, 400, 672), (64, 200, 336), (256, 200, 336), (128, 100, 168), (512, 100, 168),
    (256, 50, 84), (1024, 50, 84), (512, 25, 42), (2048, 25, 42),
]  # fmt: skip
SHAPES = [shape for n in (1, 2) for shape in [*((n, *m) for m in MAPS), (1000 * n, 256, 7, 7)]]
SHAPES += [(100, 256, 14, 14), (200, 256, 14, 14)]


def kernel_messages(caplog):
    """What was logged on kernels; on a CPU, the config says that it has no GPU, too."""
    return [r.getMessage() for r in caplog.records if r.name != "gnws_d2.config"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_run_on_every_shape_of_the_measurements(dtype, monkeypatch, caplog):
    monkeypatch.setattr(choice, "find_difference", lambda *_: "")
    for shape in SHAPES:
        x = torch.empty(shape, dtype=dtype, device="meta")
        assert choice.find_kernels("group_norm", "auto", x, 32) is gn
        assert choice.find_kernels("group_norm", "torch", x, 32) is None
    assert kernel_messages(caplog) == []


@pytest.mark.parametrize("name", model_zoo.names())
def test_kernels_run_in_every_layer_of_the_model_zoo(name, monkeypatch, caplog):
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
        assert choice.find_kernels("group_norm", norm.kernels, x, norm.num_groups) is gn
    for conv in convs:
        arguments = ("weight_standardization", conv.kernels, conv.weight, torch.float16)
        assert choice.find_kernels(*arguments) is ws
    assert kernel_messages(caplog) == []


@pytest.mark.parametrize("mode, calls", [("auto", 1), ("triton", 1), ("torch", 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_chosen_operators_run_with_the_same_numbers(kernels, mode, calls, grad):
    x, groups, weight, bias = arguments(2, 8, 6, 6)
    residual = torch.randn_like(x)
    module = GroupNorm(groups, 8)
    module.kernels = mode
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    module(x)  # checked at first use
    kernels.calls = 0
    leaves = [t.requires_grad_(grad) for t in (x, *module.parameters(), residual)]
    y = module(x, residual, relu=True)
    expected = F.relu(F.group_norm(x, groups, *module.parameters()) + residual)
    assert kernels.calls == calls
    torch.testing.assert_close(y, expected)
    if grad:
        grads = [torch.autograd.grad(out, leaves, torch.ones_like(x)) for out in (y, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_standardization_runs_the_kernels(dtype, monkeypatch):
    """Also into half precision, as in autocast."""
    calls = []
    monkeypatch.setattr(ws, "standardize", lambda *a, f=ws.standardize: calls.append(a) or f(*a))
    weight = torch.randn(4, 3, 3, 3, device=DEVICE, requires_grad=True)
    standardize_weight(weight, dtype=dtype)  # checked at first use
    calls.clear()
    outs = [standardize_weight(weight, dtype=dtype, kernels=mode) for mode in ("auto", "torch")]
    assert len(calls) == 1 and list(choice._failures) == [
        ("weight_standardization", dtype, weight.device)
    ]
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(*outs, **tolerance)
    g = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(y, weight, g)[0] for y in outs]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("name", ["group_norm", "weight_standardization"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_pass_the_check(name, dtype):
    assert choice.find_failure(name, dtype, DEVICE) == ""


def test_right_kernels_are_checked_once(kernels):
    x = arguments(2, 8, 4, 4)[0]
    assert choice.find_kernels("group_norm", "auto", x, 4) is kernels
    calls = kernels.calls
    assert choice.find_kernels("group_norm", "auto", x, 4) is kernels
    assert kernels.calls == calls > 0
    choice.find_kernels("group_norm", "auto", x.half(), 4)
    assert kernels.calls > calls


def wrong(y):
    return y + 0.01 * y.detach()


def wrong_gradient(y):
    y.register_hook(lambda grad: grad * 1.01)
    return y


def failing(y):
    raise RuntimeError("out of\nregisters")


@pytest.mark.parametrize(
    "change, reason",
    [
        (wrong, "of the largest value in the output of a tensor of ((3, 64, 7, 5), 32, True, True"),
        (wrong_gradient, "of the largest value in the gradient of the input of a tensor of"),
        (lambda y: y * float("nan"), "nan of the largest value in the output"),
        (failing, "RuntimeError: out of registers"),
    ],
)
def test_kernels_that_fail_the_check_never_run_and_are_reported_once(
    kernels, change, reason, caplog
):
    kernels.change = change
    x, groups, weight, bias = arguments(2, 8, 4, 4)
    for _ in range(3):
        y = group_norm(x, groups, weight, bias)
        torch.testing.assert_close(y, F.group_norm(x, groups, weight, bias))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert "the kernels of group_norm in torch.float32 fail their check" in text
    assert reason in text and "please report this" in text
    assert choice.summarize() == "On the GPU: PyTorch's own operators for group_norm in float32."
    with pytest.raises(UserError, match=r'KERNELS is "triton", but .*: set it to "auto"\.$'):
        group_norm(x, groups, weight, bias, kernels="triton")


@pytest.mark.parametrize("weight_dtype", FLOATS[:2], ids=str)
def test_wrong_standardization_is_found(weight_dtype, monkeypatch):
    """In half precision, also of the float32 weights that autocast keeps."""

    def wrong_backward(grad, out, std, eps, dtype):
        scale = 1.01 if dtype == weight_dtype else 1
        return ws.standardize_backward(grad, out, std, eps, dtype) * scale

    fake = SimpleNamespace(standardize_backward=wrong_backward, standardize=ws.standardize)
    monkeypatch.setattr(choice, "_import", lambda name: fake)
    assert "gradient" in choice.find_failure("weight_standardization", torch.float16, DEVICE)


def test_where_kernels_cannot_run(monkeypatch, caplog):
    """PyTorch's own operators run, with a warning for each reason; "triton" is an error."""
    x, weight, bias = torch.randn(2, 12, 4, 4), torch.ones(12), torch.zeros(12)

    def check(groups):
        for _ in range(2):
            y = group_norm(x, groups, weight, bias)
            torch.testing.assert_close(y, F.group_norm(x, groups, weight, bias))
        with pytest.raises(UserError) as e:
            group_norm(x, groups, weight, bias, kernels="triton")
        reason = caplog.records[-1].getMessage().split(": ", 1)[1].rstrip(".")
        assert reason in str(e.value)
        return reason

    assert check(4) == "there is no GroupNorm kernel for groups of 3 channels"
    monkeypatch.setattr(choice, "has_triton", lambda device: False)
    assert check(6) == "Triton is not installed or does not support this GPU"
    assert len(caplog.records) == 2


def test_error_of_one_call_has_no_effect_on_the_next(kernels):
    """As when memory runs out: the caller gets the error of the operator itself."""
    x, groups, weight, bias = arguments(2, 8, 4, 4)
    group_norm(x, groups, weight, bias)
    kernels.change = failing
    with pytest.raises(RuntimeError, match="registers"):
        group_norm(x, groups, weight, bias)
    kernels.change, kernels.calls = (lambda y: y), 0
    group_norm(x, groups, weight, bias)
    assert kernels.calls == 1


def test_kernels_are_not_checked_in_the_capture_of_a_cuda_graph(kernels, monkeypatch, caplog):
    x, groups, weight, bias = arguments(2, 8, 4, 4)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        group_norm(x, groups, weight, bias)
    assert kernels.calls == 0 and "cannot be checked in a CUDA graph" in caplog.text
    group_norm(x, groups, weight, bias)
    assert kernels.calls > 0


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


def test_summary_names_the_operators():
    assert choice.summarize() == ""
    choice._failures["group_norm", torch.float32, DEVICE] = ""
    choice._failures["weight_standardization", torch.float32, DEVICE] = ""
    choice.forbid("group_norm", torch.float16, DEVICE, "it is wrong")
    assert choice.summarize() == (
        "On the GPU: Triton kernels for group_norm in float32, weight_standardization in float32; "
        "PyTorch's own operators for group_norm in float16."
    )


def test_first_use_under_activation_checkpointing_and_autocast(kernels):
    """Hooks on saved tensors, and autocast, are the caller's, not those of the check."""
    x, groups, weight, bias = arguments(2, 8, 6, 6)
    x.requires_grad_()

    def forward(x):
        return group_norm(x * 2, groups, weight, bias, relu=True)

    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(forward, x, use_reentrant=False)
    expected = F.relu(F.group_norm(x * 2, groups, weight, bias))
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(out, x, torch.ones_like(x))[0] for out in (y, expected)]
    torch.testing.assert_close(*grads)
