"""
The Triton kernels against the formulas in float64: on the GPU where there is one, otherwise under
Triton's interpreter (conftest.py), which runs the same code on the CPU.
"""

import pytest
import torch
from conftest import run_python
from test_weight_standardization import formula
from torch.nn import functional as F

from gnws_d2.layers.kernels import group_norm as gn
from gnws_d2.layers.kernels import weight_standardization as ws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# One tile of several groups, one of a whole group, groups in several tiles; one channel in a group.
SHAPES = [
    pytest.param((3, 64, 7, 7), 32, id="small"),
    pytest.param((2, 16, 37, 41), 2, id="whole"),
    pytest.param((2, 16, 93, 61), 4, id="split"),
    pytest.param((1, 4, 150, 129), 4, id="split, one channel"),
]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def error(actual, expected):
    """Relative to the largest value, so that half precision has its own rounding alone."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_group_norm_forward_and_backward(dtype, shape, groups, residual, relu):
    torch.manual_seed(0)
    # A mean that is large beside the std, as cancellation would show in the variance.
    x = (torch.randn(shape, device=DEVICE) + 3).to(dtype)
    if relu and not residual:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], device=DEVICE)
    bias = torch.randn(shape[1], device=DEVICE)
    inputs = [x, weight, bias] + ([torch.randn(shape, device=DEVICE).to(dtype)] if residual else [])
    grad = torch.randn(shape, device=DEVICE).to(dtype)

    doubles = [t.double().requires_grad_() for t in inputs]
    expected = F.group_norm(doubles[0], groups, doubles[1], doubles[2], 1e-5)
    expected = sum(doubles[3:], expected)
    # Where rounding decides the sign, the gradient is arbitrary.
    grad[expected.abs() < 0.02] = 0
    expected = expected.relu() if relu else expected
    expected_grads = torch.autograd.grad(expected, doubles, grad.double())

    leaves = [t.requires_grad_() for t in inputs]
    x, weight, bias, *rest = leaves
    y = gn.group_norm(x, groups, weight, bias, 1e-5, *(rest or [None]), relu)
    with torch.no_grad():
        assert torch.equal(gn.group_norm(x, groups, weight, bias, 1e-5, *(rest or [None]), relu), y)
    assert y.dtype == dtype
    assert error(y, expected) < TOLERANCE[dtype]
    for actual, expected, leaf in zip(torch.autograd.grad(y, leaves, grad), expected_grads, leaves):
        assert actual.dtype == leaf.dtype
        assert error(actual, expected) < 3 * TOLERANCE[dtype]


def test_what_the_kernels_do_not_take():
    assert ws.unsupported_reason(torch.zeros(2, 64, 16, 16)) == ""
    assert "over 16384 values" in ws.unsupported_reason(torch.zeros(2, 65, 16, 16))
    assert gn.unsupported_reason(torch.zeros(1, 64, 4, 4), 32) == ""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(6, 3, 7, 7), (5, 64, 1, 1), (3, 512, 3, 3), (2, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("offset", [0, 10])
def test_weight_standardization_forward_and_backward(dtype, shape, offset):
    torch.manual_seed(0)
    weight = torch.randn(shape, device=DEVICE) + offset
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    out, std = ws.standardize(weight, 1e-5, dtype)
    grad_weight = ws.standardize_backward(grad, out, std, 1e-5, torch.float32)
    assert (out.dtype, grad_weight.dtype) == (dtype, torch.float32)
    if weight[0].numel() == 1:
        assert out.abs().max() == 0 and grad_weight.abs().max() == 0
        return
    double = weight.double().requires_grad_()
    expected = formula(double)
    (expected_grad,) = torch.autograd.grad(expected, double, grad.double())
    assert error(out, expected) < 3 * TOLERANCE[dtype]
    assert error(grad_weight, expected_grad) < 3 * TOLERANCE[dtype]


def test_filter_of_equal_values_gives_zeros_and_finite_gradients():
    out, std = ws.standardize(torch.full((2, 64, 3, 3), 0.1, device=DEVICE), 1e-5, torch.float32)
    grad = ws.standardize_backward(torch.randn_like(out), out, std, 1e-5, torch.float32)
    assert out.abs().max() == 0
    assert grad.isfinite().all()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from gnws_d2.layers.kernels import group_norm as gn
from gnws_d2.layers.kernels import weight_standardization as ws

OF_INPUT = ("x_ptr", "residual_ptr", "y_ptr", "grad_y_ptr", "grad_x_ptr", "grad_residual_ptr")

def compile_for(capability, kernel, **constants):
    signature = {}
    for name in kernel.arg_names:
        pointer = "*fp16" if name in OF_INPUT else "*fp32"
        number = "fp32" if name == "eps" else "i32"
        signature[name] = pointer if name.endswith("_ptr") else number
        if name in constants:
            signature[name] = "constexpr"
    source = ASTSource(kernel, signature, constants)
    print(kernel.__name__, len(compile(source, GPUTarget("cuda", capability, 32)).asm["cubin"]))

for capability in (80, 90):
    for block_s, block_p in ((0, 64), (64, 1024)):
        block = dict(VEC=8, BLOCK_C=16, BLOCK_P=block_p)
        fused = dict(RESIDUAL=True, RELU=True)
        group = dict(D=8, BLOCK_S=block_s)
        compile_for(capability, gn._moments_kernel, **block)
        compile_for(capability, gn._normalize_kernel, **block, **fused, **group)
        compile_for(capability, gn._grad_sums_kernel, **block, **fused)
        compile_for(capability, gn._grad_input_kernel, **block, **fused, **group)
    compile_for(capability, ws._standardize_kernel, BLOCK=1024)
    compile_for(capability, ws._grad_kernel, BLOCK=1024)
"""


def test_kernels_compile_for_gpus(tmp_path):
    """The interpreter takes what the compiler does not; the compiler needs no GPU."""
    printed = run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert len(printed.splitlines()) == 20
