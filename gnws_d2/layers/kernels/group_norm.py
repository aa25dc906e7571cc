"""
GroupNorm, with the residual and the ReLU after it, as Triton kernels.

PyTorch gives each group of each image to one block: 32 blocks for one image, on GPUs with over 100
multiprocessors. Here a group larger than a tile is split over many blocks, in two passes: the first
computes the moments of each channel of each tile, the second combines them and normalizes. Smaller
groups take one pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 8192  # elements of a tile of a split group
_WHOLE = 16384  # elements of the largest group that is one tile


@triton.jit
def _group_sum(v, D: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C,) -> (BLOCK_C,): for each channel the sum over its group of D."""
    total = tl.sum(tl.reshape(v, (BLOCK_C // D, D)), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], (BLOCK_C // D, D)), (BLOCK_C,))


@triton.jit
def _tile(C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, channels, offsets and mask of this program's tile of (N, C, P)."""
    blocks = C // BLOCK_C
    n = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets = (n.to(tl.int64) * C + c)[:, None] * P + p[None, :]
    return n, c, offsets, (p < P)[None, :]


@triton.jit
def _partials(n, c, C, split, splits):
    """Offsets into (N, splits, C)."""
    return (n.to(tl.int64) * splits + split) * C + c


@triton.jit
def _moments_kernel(x_ptr, mean_ptr, m2_ptr, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Mean of each channel of the tile, and its sum of squared differences from that mean."""
    n, c, offsets, mask = _tile(C, P, BLOCK_C, BLOCK_P)
    split = tl.program_id(1)
    count = tl.minimum(P - split * BLOCK_P, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / count
    difference = tl.where(mask, x - mean[:, None], 0.0)
    out = _partials(n, c, C, split, tl.num_programs(1))
    tl.store(mean_ptr + out, mean)
    tl.store(m2_ptr + out, tl.sum(difference * difference, 1))


@triton.jit
def _normalize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, m2_ptr, y_ptr, saved_mean_ptr,
    saved_rstd_ptr, C, P, eps, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    SPLITS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """SPLITS: number of splits, rounded up to a power of two; 1 if tiles hold whole groups."""
    n, c, offsets, mask = _tile(C, P, BLOCK_C, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SPLITS == 1:
        mean = _group_sum(tl.sum(x, 1), D, BLOCK_C) / (D * P)
        difference = tl.where(mask, x - mean[:, None], 0.0)
        m2 = tl.sum(difference * difference, 1)
    else:
        splits = tl.num_programs(1)
        split = tl.arange(0, SPLITS)[:, None]
        there = split < splits
        partials = _partials(n, c[None, :], C, split, splits)
        count = tl.where(there, tl.minimum(P - split * BLOCK_P, BLOCK_P), 0).to(tl.float32)
        means = tl.load(mean_ptr + partials, mask=there, other=0.0)
        mean = _group_sum(tl.sum(means * count, 0), D, BLOCK_C) / (D * P)
        # Chan et al. 1983: the tiles' squared differences, and those of their means.
        shift = means - mean[None, :]
        m2s = tl.load(m2_ptr + partials, mask=there, other=0.0)
        m2 = tl.sum(m2s + count * shift * shift, 0)
    rstd = 1 / tl.sqrt(_group_sum(m2, D, BLOCK_C) / (D * P) + eps)
    if tl.program_id(1) == 0:
        tl.store(saved_mean_ptr + n * C + c, mean)
        tl.store(saved_rstd_ptr + n * C + c, rstd)
    weight = tl.load(weight_ptr + c).to(tl.float32)
    bias = tl.load(bias_ptr + c).to(tl.float32)
    y = (x - mean[:, None]) * rstd[:, None] * weight[:, None] + bias[:, None]
    if RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_grad(
    grad_y_ptr, x_ptr, y_ptr, saved_mean_ptr, saved_rstd_ptr, weight, bias_ptr, n, c, C, offsets,
    mask, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The gradient before the ReLU, the normalized x and 1 / std, in float32."""
    grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(saved_rstd_ptr + n * C + c)
    normalized = (x - tl.load(saved_mean_ptr + n * C + c)[:, None]) * rstd[:, None]
    if RELU:
        if RESIDUAL:
            positive = tl.load(y_ptr + offsets, mask=mask, other=0.0) > 0
        else:  # computing y again is faster than reading it
            positive = normalized * weight[:, None] + tl.load(bias_ptr + c)[:, None] > 0
        grad = tl.where(positive, grad, 0.0)
    return grad, tl.where(mask, normalized, 0.0), rstd


@triton.jit
def _grad_sums_kernel(
    grad_y_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, saved_mean_ptr, saved_rstd_ptr, sum_ptr,
    dot_ptr, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Sums over each channel of the tile of the gradient and of gradient * normalized x."""
    n, c, offsets, mask = _tile(C, P, BLOCK_C, BLOCK_P)
    weight = tl.load(weight_ptr + c).to(tl.float32)
    grad, normalized, _ = _load_grad(
        grad_y_ptr, x_ptr, y_ptr, saved_mean_ptr, saved_rstd_ptr, weight, bias_ptr, n, c, C,
        offsets, mask, RESIDUAL, RELU,
    )  # fmt: skip
    out = _partials(n, c, C, tl.program_id(1), tl.num_programs(1))
    tl.store(sum_ptr + out, tl.sum(grad, 1))
    tl.store(dot_ptr + out, tl.sum(grad * normalized, 1))


@triton.jit
def _grad_input_kernel(
    grad_y_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, saved_mean_ptr, saved_rstd_ptr, sum_ptr,
    dot_ptr, grad_x_ptr, grad_residual_ptr, C, P, D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, SPLITS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    n, c, offsets, mask = _tile(C, P, BLOCK_C, BLOCK_P)
    weight = tl.load(weight_ptr + c).to(tl.float32)
    grad, normalized, rstd = _load_grad(
        grad_y_ptr, x_ptr, y_ptr, saved_mean_ptr, saved_rstd_ptr, weight, bias_ptr, n, c, C,
        offsets, mask, RESIDUAL, RELU,
    )  # fmt: skip
    if SPLITS == 1:
        total, dot = tl.sum(grad, 1), tl.sum(grad * normalized, 1)
        tl.store(sum_ptr + n * C + c, total)
        tl.store(dot_ptr + n * C + c, dot)
    else:
        splits = tl.num_programs(1)
        split = tl.arange(0, SPLITS)[:, None]
        partials = _partials(n, c[None, :], C, split, splits)
        total = tl.sum(tl.load(sum_ptr + partials, mask=split < splits, other=0.0), 0)
        dot = tl.sum(tl.load(dot_ptr + partials, mask=split < splits, other=0.0), 0)
    mean_grad = _group_sum(total * weight, D, BLOCK_C) / (D * P)
    mean_dot = _group_sum(dot * weight, D, BLOCK_C) / (D * P)
    grad_x = grad * weight[:, None] - mean_grad[:, None] - normalized * mean_dot[:, None]
    grad_x = (grad_x * rstd[:, None]).to(grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + offsets, grad_x, mask=mask)
    if RESIDUAL:
        grad = grad.to(grad_residual_ptr.dtype.element_ty)
        tl.store(grad_residual_ptr + offsets, grad, mask=mask)


def unsupported_reason(x: Tensor, num_groups: int) -> str:
    """Return why :class:`GroupNormFunction` cannot run on `x`; empty if it can."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no GroupNorm kernel for {x.dtype}"
    d = x.size(1) // num_groups
    if d & (d - 1) or d > _TILE // 16:
        return f"no GroupNorm kernel for groups of {d} channels"
    return "" if x.numel() else "there is nothing to normalize"


def _tiling(c: int, p: int, d: int) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P): whole groups of channels by all of a small map or a piece of a map."""
    block_p = triton.next_power_of_2(p)
    if d * block_p > _WHOLE:
        return d, _TILE // d
    block_c = d
    # Small groups are taken together, as long as one image is still many blocks.
    while block_c * block_p < _TILE // 4 and c % (2 * block_c) == 0 and block_c < 8 * d:
        block_c *= 2
    return block_c, block_p


class GroupNormFunction(torch.autograd.Function):
    """
    ``relu(group_norm(x) + residual)``, with the residual and the ReLU optional.

    `x` is (N, C, ...), float32, float16 or bfloat16; C / num_groups is a power of two. The output
    and the residual have the dtype of `x`; statistics, sums and products are float32. Backward
    keeps `x`, and with both residual and ReLU the output, which the next layer keeps anyway.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, residual, relu):
        x = x.contiguous()
        n, c = x.shape[:2]
        p = x[0, 0].numel()
        d = c // num_groups
        tile = block_c, block_p = _tiling(c, p, d)
        splits = triton.cdiv(p, block_p)
        grid = (n * (c // block_c), splits)
        launch = {"num_warps": 4 if block_c * block_p < _TILE else 8}
        y = torch.empty_like(x)
        saved = x.new_empty((2, n, c), dtype=torch.float32)
        moments = saved  # not read where there is one split
        if residual is not None:
            residual = residual.to(x.dtype).contiguous()
        if splits > 1:
            moments = x.new_empty((2, n, splits, c), dtype=torch.float32)
            _moments_kernel[grid](x, *moments, c, p, *tile, **launch)
        options = (triton.next_power_of_2(splits), residual is not None, relu)
        _normalize_kernel[grid](
            x, residual, weight, bias, *moments, y, *saved, c, p, eps, d, *tile, *options, **launch
        )
        ctx.save_for_backward(x, weight, bias, saved, y if relu and residual is not None else None)
        ctx.constants = c, p, d, tile, options, grid, launch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, saved, y = ctx.saved_tensors
        c, p, d, tile, options, grid, launch = ctx.constants
        splits, with_residual = grid[1], options[1]
        grad_x = torch.empty_like(x)
        grad_residual = torch.empty_like(x) if with_residual else None
        sums = x.new_empty((2, len(x), splits, c), dtype=torch.float32)
        inputs = (grad_y.contiguous(), x, y, weight, bias, *saved, *sums)
        if splits > 1:
            _grad_sums_kernel[grid](*inputs, c, p, *tile, *options[1:], **launch)
        _grad_input_kernel[grid](*inputs, grad_x, grad_residual, c, p, d, *tile, *options, **launch)
        grad_bias, grad_weight = sums.sum((1, 2)).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, grad_residual, None
