"""Check the Triton kernels against PyTorch's operators, on the GPU that they are to run on."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Of the largest value, or of 1 if all are smaller; several times the rounding.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Shape, groups, residual and ReLU, eps: groups in one tile, of odd sizes; in several; of one
# element, whose gradient is zero, and its rounding is multiplied by 1 / sqrt(eps).
_GROUP_NORM = [
    ((3, 64, 7, 5), 32, True, True, 1e-5),
    ((2, 8, 93, 61), 2, True, True, 1e-5),
    ((2, 4, 1, 1), 4, False, True, 1.0),
]
_WEIGHTS = [(6, 3, 7, 7), (5, 64, 1, 1), (2, 1, 1, 1)]
_EPS = 1e-5


def find_difference(dtype: torch.dtype, device: torch.device) -> str:
    """
    Compare all kernels, forward and backward, with PyTorch's operators in float64, on small seeded
    inputs.

    Args:
        dtype: a key of ``TOLERANCE``.

    Returns:
        What differs beyond rounding; "" if nothing does.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    cases: list[tuple[Callable, tuple]] = [(_check_group_norm, case) for case in _GROUP_NORM]
    cases += [(_check_weight_standardization, case) for case in _WEIGHTS]
    for check, case in 2 * cases:  # the second launch of a kernel is another one than the first
        for actual, expected in check(dtype, randn, case):
            error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
            if not error <= TOLERANCE[dtype]:  # NaN, too
                name = check.__name__.removeprefix("_check_")
                return f"{error:.1e} of the largest value in {name} of {case}"
    return ""


def _check_group_norm(
    dtype: torch.dtype, randn: Callable[..., Tensor], case: tuple
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the output and each gradient of the kernels, with what is expected."""
    from . import group_norm as kernels  # imports Triton

    shape, groups, with_residual, relu, eps = case
    inputs = [(randn(*shape) + 3).to(dtype), *randn(2, shape[1])]
    inputs += [randn(*shape).to(dtype)] if with_residual else []
    doubles = [t.double().requires_grad_() for t in inputs]
    x, weight, bias = doubles[:3]
    expected = F.group_norm(x, groups, weight, bias, eps)
    expected = sum(doubles[3:], expected)
    # Where rounding decides the sign, the gradient is anything.
    grad = randn(*shape).to(dtype).where(expected.abs() > 0.05, 0)
    expected = expected.relu() if relu else expected

    leaves = [t.requires_grad_() for t in inputs]
    residual = leaves[3] if with_residual else None
    x, weight, bias = leaves[:3]
    y = kernels.group_norm(x, groups, weight, bias, eps, residual, relu)
    yield y, expected
    grads = torch.autograd.grad(expected, doubles, grad.double())
    yield from zip(torch.autograd.grad(y, leaves, grad), grads)


def _check_weight_standardization(
    dtype: torch.dtype, randn: Callable[..., Tensor], case: tuple
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the output, the std and the gradient of the kernels, with what is expected."""
    from . import weight_standardization as kernels  # imports Triton

    for weight_dtype in dict.fromkeys((torch.float32, dtype)):  # autocast keeps float32
        weight, grad = (randn(*case) + 1).to(weight_dtype), randn(*case).to(dtype)
        out, std = kernels.standardize(weight, _EPS, dtype)
        grad_weight = kernels.standardize_backward(grad, out, std, _EPS, weight_dtype)
        w = weight.double().flatten(1).requires_grad_()
        expected_std, mean = torch.std_mean(w, 1, correction=min(1, w.size(1) - 1), keepdim=True)
        expected = (w - mean) / (expected_std + _EPS)
        (expected_grad,) = torch.autograd.grad(expected, w, grad.double().flatten(1))
        if w.size(1) == 1:  # 0 / 0 in the formula's gradient
            expected_grad = torch.zeros_like(w)
        yield out.flatten(1), expected
        yield std, expected_std
        yield grad_weight.flatten(1), expected_grad
