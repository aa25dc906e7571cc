"""
The choice of operators, with kernels made up here on the CPU, and with ours on the GPU where there
is one, otherwise under Triton's interpreter (conftest.py).
"""

import logging
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gnws_d2.layers import GroupNorm, group_norm, standardize_weight
from gnws_d2.layers import group_norm as group_norm_function
from gnws_d2.layers.kernels import choice, launch
from gnws_d2.layers.kernels import weight_standardization as ws

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU  # of Triton
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NORM = sys.modules[group_norm_function.__module__]
STANDARDIZATION = sys.modules[standardize_weight.__module__]


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    """Nothing is decided yet, and CPU tensors pass for tensors on a GPU."""
    monkeypatch.setattr(choice, "_passed", {})
    monkeypatch.setattr(choice, "_choices", {})
    for module in (NORM, STANDARDIZATION):
        monkeypatch.setattr(module, "_chosen", {})
        monkeypatch.setattr(module, "can_choose", lambda x: True)
    monkeypatch.setattr(choice, "has_triton", lambda device: True)


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


@pytest.fixture
def times(monkeypatch):
    """Seconds of the candidates of a choice, by name, in place of a clock; returns what was run."""
    seconds, run = {}, []

    def time_all(candidates, device):
        run.append(list(candidates))
        for candidate in candidates.values():
            candidate()
        return {name: seconds.get(name, 1.0) for name in candidates}

    monkeypatch.setattr(choice, "_time_all", time_all)
    return SimpleNamespace(seconds=seconds, run=run)


def arguments(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*shape).to(dtype)
    return x, shape[1] // 2, *torch.randn(2, shape[1])


@pytest.mark.parametrize("name", ["group_norm", "weight_standardization"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_pass_the_check(name, dtype, caplog):
    assert choice.passes_check(name, dtype, DEVICE)
    assert caplog.records == []


def test_right_kernels_are_checked_once(kernels):
    x = arguments(2, 8, 4, 4)[0]
    assert choice.get_kernels("group_norm", x, 4) is kernels
    calls = kernels.calls
    assert choice.get_kernels("group_norm", x, 4) is kernels
    assert kernels.calls == calls > 0
    choice.get_kernels("group_norm", x.half(), 4)
    assert kernels.calls > calls


def wrong(y):
    return y + 0.01 * y.detach()


def wrong_gradient(y):
    y.register_hook(lambda grad: grad * 1.01)
    return y


def failing(y):
    raise RuntimeError("out of\nregisters")


def hanging(y):
    time.sleep(30)


@pytest.mark.parametrize(
    "change, reason",
    [
        (wrong, "of the largest value in the output of a tensor of ((3, 64, 7, 5), 32, True, True"),
        (wrong_gradient, "of the largest value in the gradient of the input of a tensor of"),
        (lambda y: y * float("nan"), "nan of the largest value in the output"),
        (failing, "RuntimeError: out of registers"),
        (hanging, "TimeoutError: no result within 0.5 seconds"),
    ],
)
def test_kernels_that_fail_the_check_never_run_and_are_reported_once(
    kernels, change, reason, caplog, monkeypatch
):
    monkeypatch.setattr(choice, "CHECK_TIMEOUT", 0.5 if change is hanging else 60)
    kernels.change = change
    x, groups, weight, bias = arguments(2, 8, 4, 4)
    for mode in ("auto", "triton", "auto"):
        y = group_norm(x, groups, weight, bias, kernels=mode)
        torch.testing.assert_close(y, F.group_norm(x, groups, weight, bias))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert reason in text and "group_norm in torch.float32" in text and "Please report" in text


def test_wrong_standardization_is_found(monkeypatch):
    fake = SimpleNamespace(standardize_backward=ws.standardize_backward, standardize=ws.standardize)
    monkeypatch.setattr(choice, "_import", lambda name: fake)
    assert choice.passes_check("weight_standardization", torch.float32, DEVICE)
    fake.standardize_backward = lambda *args: ws.standardize_backward(*args) * 1.01
    assert not choice.passes_check("weight_standardization", torch.float16, DEVICE)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("winner", ["triton", "torch", "channels-last"])
def test_the_fastest_runs_with_the_same_numbers(kernels, times, winner, grad):
    times.seconds[winner] = 0.5
    x, groups, weight, bias = arguments(2, 8, 6, 6)
    residual = torch.randn_like(x)
    leaves = [t.requires_grad_(grad) for t in (x, weight, bias, residual)]
    with torch.set_grad_enabled(grad):
        group_norm(x, groups, weight, bias, 1e-5, residual, relu=True)  # is timed
        calls = kernels.calls
        y = group_norm(x, groups, weight, bias, 1e-5, residual, relu=True)
        expected = F.relu(F.group_norm(x, groups, weight, bias) + residual)
    assert times.run == [["triton", "torch", "channels-last"]]
    assert kernels.calls - calls == (winner == "triton")
    torch.testing.assert_close(y, expected)
    if grad:
        grads = [torch.autograd.grad(out, leaves, torch.ones_like(x)) for out in (y, expected)]
        torch.testing.assert_close(*grads)


def test_shapes_are_timed_in_powers_of_two_and_options_apart(kernels, times):
    x, groups, weight, bias = arguments(2, 8, 33, 40)
    group_norm(x, groups, weight, bias)
    group_norm(torch.randn(3, 8, 63, 62), groups, weight, bias)
    assert len(times.run) == 1
    group_norm(torch.randn(3, 8, 64, 62), groups, weight, bias)
    group_norm(x, groups, weight, bias, relu=True)
    group_norm(x, groups, weight, bias, residual=x)
    group_norm(x, groups // 2, weight, bias)
    group_norm(x.bfloat16(), groups, weight, bias)
    with torch.no_grad():
        group_norm(x, groups, weight, bias)
    assert len(times.run) == 7


@pytest.mark.parametrize("mode, calls", [("triton", 1), ("torch", 0)])
def test_forced_operators_are_not_timed(kernels, times, mode, calls):
    x, groups, *_ = arguments(2, 8, 6, 6)
    module = GroupNorm(groups, 8)
    module.kernels = mode
    module(x)
    kernels.calls = 0
    module(x)
    assert times.run == [] and kernels.calls == calls


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("winner", ["triton", "torch"])
def test_weight_standardization_runs_the_fastest(times, winner, grad):
    times.seconds[winner] = 0.5
    weight = torch.randn(4, 3, 3, 3, device=DEVICE, requires_grad=grad)
    out = standardize_weight(weight)
    expected = standardize_weight(weight, kernels="torch")
    torch.testing.assert_close(out, expected)
    assert times.run == [["triton", "torch"]]
    (module,) = STANDARDIZATION._chosen.values()
    assert module is (ws if winner == "triton" else None)
    if grad:
        g = torch.randn_like(out)
        torch.testing.assert_close(*(torch.autograd.grad(y, weight, g)[0] for y in (out, expected)))


def test_candidates_are_timed_in_turns_and_one_that_fails_is_out(monkeypatch, caplog):
    order = []

    def candidate(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    candidates = {"slow": candidate("slow", 0.02), "fast": candidate("fast", 0.001)}
    candidates["broken"] = lambda: failing(None)
    assert choice.fastest("key", candidates, CPU) == "fast"
    assert order == ["slow", "fast"] * 5
    assert [r.getMessage() for r in caplog.records] == ["broken cannot run here: out of registers"]
    assert choice.fastest("key", {"slow": None, "fast": None}, CPU) == "fast"
    sentence = choice.summarize()
    assert "for 1 shapes: fast for 1" in sentence


def test_nothing_is_decided_where_all_candidates_fail(caplog):
    """As when memory runs out: the caller gets the error of the operator itself."""
    candidates = {"triton": lambda: failing(None), "torch": lambda: failing(None)}
    assert choice.fastest("key", candidates, CPU) == "triton"
    assert choice.summarize() == "" and len(caplog.records) == 2


@pytest.mark.parametrize("seconds, winner", [(0.95, "triton"), (0.85, "torch")])
def test_tie_goes_to_the_first_candidate(times, seconds, winner):
    times.seconds["torch"] = seconds
    candidates = {"triton": lambda: None, "torch": lambda: None}
    assert choice.fastest("key", candidates, CPU) == winner


def test_summary_counts_winners_and_the_time_won(monkeypatch):
    assert choice.summarize() == ""
    seconds = [("triton", {"triton": 0.001, "torch": 0.003}), ("torch", {"torch": 0.002})]
    choice._choices.update(enumerate(choice.Choice(*pair) for pair in seconds))
    monkeypatch.setattr(choice, "_seconds_spent", 1.25)
    assert choice.summarize() == (
        "The fastest operators for 2 shapes: triton for 1, torch for 1; each once takes 3.00 ms, "
        "with PyTorch's alone 5.00 ms. To check, compile and time the kernels took 1.2 s."
    )


def test_first_use_under_activation_checkpointing_and_autocast(kernels):
    """Hooks on saved tensors, and autocast, are the caller's, not those of what is timed."""
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


class FakeCompiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launched = []

    def run(self, *args):
        self.launched.append(args)


@pytest.fixture
def fake_kernel(monkeypatch):
    """A kernel that records how it is launched: by Triton, or directly."""
    kernel = SimpleNamespace(by_triton=[], compiled=[])

    def compile_and_run(*args, **options):
        kernel.by_triton.append(args)
        kernel.compiled.append(FakeCompiled())
        return kernel.compiled[-1]

    jit = {(3, 2): compile_and_run}
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_DIRECT", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: "stream", raising=False)
    kernel.launch = lambda *args: launch.launch(jit, (3, 2), *args)
    return kernel


def test_kernels_are_launched_directly_from_the_second_time_on(fake_kernel):
    x = torch.zeros(32)
    for number in (5, 6, 7):
        fake_kernel.launch((x,), (number,), (True,), (x.dtype,), 4)
    assert fake_kernel.by_triton == [(x, 5, True)]
    fixed = (3, 2, 1, "stream", "function", "metadata", None, None, None)
    (compiled,) = fake_kernel.compiled
    assert compiled.launched == [(*fixed, x.data_ptr(), number, True) for number in (6, 7)]


def test_other_types_constants_and_alignments_are_compiled_apart(fake_kernel):
    x = torch.zeros(32)
    fake_kernel.launch((x,), (5,), (True,), (x.dtype,), 4)
    fake_kernel.launch((x[1:],), (5,), (True,), (x.dtype,), 4)  # not aligned to 16 bytes
    fake_kernel.launch((x[1:],), (5,), (True,), (x.dtype,), 4)
    fake_kernel.launch((x,), (5,), (False,), (x.dtype,), 4)
    fake_kernel.launch((x,), (5,), (True,), (torch.float16,), 4)
    fake_kernel.launch((x,), (5,), (True,), (x.dtype,), 8)
    assert len(fake_kernel.by_triton) == 6
    assert all(compiled.launched == [] for compiled in fake_kernel.compiled)
    fake_kernel.launch((x,), (5,), (True,), (x.dtype,), 4)
    assert len(fake_kernel.by_triton) == 6
