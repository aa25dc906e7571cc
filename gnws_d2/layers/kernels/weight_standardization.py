"""Weight standardization as two Triton kernels, with one program per filter."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

_MAX_SIZE = 16384  # values of a filter that a program holds in registers


@triton.jit(do_not_specialize=["size", "correction"])
def _standardize_kernel(weight_ptr, out_ptr, std_ptr, size, correction, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < size
    w = tl.load(weight_ptr + row * size + i, mask=mask, other=0.0).to(tl.float32)
    # A large common offset would cost the mean digits.
    w = tl.where(mask, w - tl.load(weight_ptr + row * size).to(tl.float32), 0.0)
    w = tl.where(mask, w - tl.sum(w, 0) / size, 0.0)
    std = tl.sqrt(tl.sum(w * w, 0) / (size - correction))
    tl.store(out_ptr + row * size + i, (w / (std + eps)).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(std_ptr + row, std)


@triton.jit(do_not_specialize=["size", "correction"])
def _grad_kernel(grad_ptr, out_ptr, std_ptr, grad_weight_ptr, size, correction, eps,
                 BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < size
    grad = tl.load(grad_ptr + row * size + i, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + row * size + i, mask=mask, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + row)
    through_std = tl.sum(grad * out, 0) / (size - correction) * (std + eps)
    through_std = through_std / tl.maximum(std, 1e-30)
    grad = (grad - tl.sum(grad, 0) / size - out * through_std) / (std + eps)
    grad = grad.to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + row * size + i, grad, mask=mask)


def unsupported_reason(weight: Tensor) -> str:
    """Return why the kernels cannot standardize `weight`; "" if they can."""
    if weight[0].numel() > _MAX_SIZE:
        return f"there is no weight standardization kernel for filters of over {_MAX_SIZE} values"
    return ""


def _launch_options(weight: Tensor) -> tuple[tuple[int, int], int, int]:
    """The size of a filter and the correction of its variance; the block and the warps."""
    size = weight.numel() // len(weight)
    block = 1 << (size - 1).bit_length()
    return (size, min(1, size - 1)), block, min(8, max(1, block // 256))


def standardize(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the standardized weight, contiguous, of `dtype`, and the (C_out, 1) float32 std."""
    numbers, block, warps = _launch_options(weight)
    weight = weight.contiguous()
    out = torch.empty_like(weight, dtype=dtype)
    std = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
    tensors = (weight, out, std)
    launch(_standardize_kernel, (len(weight), 1), tensors, (*numbers, eps), (block,), warps)
    return out, std


def standardize_backward(
    grad: Tensor, out: Tensor, std: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the weight, of `dtype`; `grad` is the gradient of `out`."""
    numbers, block, warps = _launch_options(out)
    grad_weight = torch.empty_like(out, dtype=dtype)
    tensors = (grad.contiguous(), out, std, grad_weight)
    launch(_grad_kernel, (len(out), 1), tensors, (*numbers, eps), (block,), warps)
    return grad_weight
