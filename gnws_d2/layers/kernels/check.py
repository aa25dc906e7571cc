"""Check the Triton kernels against PyTorch's operators, on the GPU that they are to run on."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Of the largest value, or of 1 if all are smaller; several times the rounding.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Shape, groups, whether there is a residual, eps: groups in one tile, of odd sizes; in several; of
# one element, whose gradient is zero, and its rounding is multiplied by 1 / sqrt(eps).
_GROUP_NORM = [
    ((3, 64, 7, 5), 32, True, 1e-5),
    ((2, 8, 93, 61), 2, True, 1e-5),
    ((2, 4, 1, 1), 4, False, 1.0),
]
_WEIGHTS = [(6, 3, 7, 7), (5, 64, 1, 1), (2, 1, 1, 1)]
_EPS = 1e-5


def find_difference(dtype: torch.dtype, device: torch.device) -> str:
    """
    Compare all kernels, forward and backward, with PyTorch's operators in float64, on small seeded
    inputs. Return what differs beyond the ``TOLERANCE`` of `dtype`; "" if nothing does.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    for check in 2 * [_check_group_norm, _check_weight_standardization]:  # compiled, then launched
        for case, actual, expected in check(dtype, randn):
            error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
            if not error <= TOLERANCE[dtype]:  # NaN, too
                return f"{error:.1e} of the largest value in {case}"
    return ""


def _check_group_norm(
    dtype: torch.dtype, randn: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the case, and the output and each gradient with what is expected."""
    from . import group_norm as kernels  # imports Triton

    for shape, groups, with_residual, eps in _GROUP_NORM:
        inputs = [(randn(*shape) + 3).to(dtype), *randn(2, shape[1])]
        inputs += [randn(*shape).to(dtype)] if with_residual else []
        doubles = [t.double().requires_grad_() for t in inputs]
        sums = F.group_norm(doubles[0], groups, doubles[1], doubles[2], eps)
        sums = sum(doubles[3:], sums)
        # Where rounding decides the sign, the gradient is arbitrary.
        grad = randn(*shape).to(dtype).where(sums.abs() > 0.05, 0)
        expected = sums.relu()

        leaves = [t.requires_grad_() for t in inputs]
        x, weight, bias, residual = [*leaves, None][:4]
        y = kernels.group_norm(x, groups, weight, bias, eps, residual, True)
        actual = [y, *torch.autograd.grad(y, leaves, grad)]
        grads = torch.autograd.grad(expected, doubles, grad.double())
        for a, e in zip(actual, [expected, *grads]):
            yield f"group_norm of {shape} in {groups} groups", a, e


def _check_weight_standardization(
    dtype: torch.dtype, randn: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the case, and the output, the std and the gradient with what is expected."""
    from . import weight_standardization as kernels  # imports Triton

    for shape in _WEIGHTS:
        for weight_dtype in dict.fromkeys((torch.float32, dtype)):  # autocast keeps float32
            weight, grad = (randn(*shape) + 1).to(weight_dtype), randn(*shape).to(dtype)
            out, std = kernels.standardize(weight, _EPS, dtype)
            actual = out, std, kernels.standardize_backward(grad, out, std, _EPS, weight_dtype)
            w = weight.double().flatten(1).requires_grad_()
            correction = min(1, w.size(1) - 1)
            expected_std, mean = torch.std_mean(w, 1, correction=correction, keepdim=True)
            expected = (w - mean) / (expected_std + _EPS)
            (expected_grad,) = torch.autograd.grad(expected, w, grad.double().flatten(1))
            if w.size(1) == 1:  # 0 / 0 in the formula's gradient
                expected_grad = torch.zeros_like(w)
            for a, e in zip(actual, (expected, expected_std, expected_grad)):
                yield f"weight_standardization of {shape}", a.flatten(1), e
