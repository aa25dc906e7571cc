"""
GroupNorm, with the residual and the ReLU after it, as Triton kernels.

PyTorch gives each group of each image to one block: 32 blocks for one image, on GPUs with over 100
multiprocessors. Here a group larger than a tile is split over many blocks, in two passes: the first
computes the moments of each channel of each tile, the second combines them and normalizes. It takes
the tiles in reverse, as the last ones are still in the cache, from which nothing that is read or
written for the last time is to displace them. Smaller groups take one pass.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import launch

# Elements of a tile of a split group, by how many a thread can load at once (:func:`_plan`), and
# of a thread: what was fastest on an H100.
_TILE = {8: 8192, 4: 4096, 1: 2048}
_PER_THREAD = {8: 32, 4: 32, 1: 16}
_WHOLE = 8192  # elements of the largest group that is one tile
_NUMBERS = ["N", "C", "P_VEC"]  # a kernel for each would take long to compile


@triton.jit
def _group_sum(v, D: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C,) -> (BLOCK_C,): for each channel the sum over its group of D."""
    total = tl.sum(tl.reshape(v, (BLOCK_C // D, D)), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], (BLOCK_C // D, D)), (BLOCK_C,))


@triton.jit
def _tile(C, P, program, split, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Channels, offsets and mask of a tile of (N, C, P), and its channels in (N, C)."""
    blocks = C // BLOCK_C
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (program // blocks).to(tl.int64) * C + c
    p = split * BLOCK_P + tl.arange(0, BLOCK_P)
    return c, row[:, None] * P + p[None, :], (p < P)[None, :], row


@triton.jit
def _partials(program, c, C, split, splits, BLOCK_C: tl.constexpr):
    """Offsets into (N, splits, C)."""
    return ((program // (C // BLOCK_C)).to(tl.int64) * splits + split) * C + c


@triton.jit(do_not_specialize=_NUMBERS)
def _moments_kernel(
    x_ptr, stats_ptr, N, C, P_VEC, VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Mean of each channel of the tile, and its sum of squared differences from that mean."""
    P = P_VEC * VEC  # tells the compiler by what P can be divided
    program, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, offsets, mask, _ = _tile(C, P, program, split, BLOCK_C, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / tl.minimum(P - split * BLOCK_P, BLOCK_P)
    difference = tl.where(mask, x - mean[:, None], 0.0)
    out = 2 * N.to(tl.int64) * C + _partials(program, c, C, split, splits, BLOCK_C)
    tl.store(stats_ptr + out, mean)
    tl.store(stats_ptr + N * splits * C + out, tl.sum(difference * difference, 1))


@triton.jit(do_not_specialize=_NUMBERS)
def _normalize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr, N, C, P_VEC, eps,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """BLOCK_S: number of splits that are combined at a time; 0 if tiles hold whole groups."""
    P = P_VEC * VEC
    splits = tl.num_programs(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    split = splits - 1 - tl.program_id(1)
    c, offsets, mask, row = _tile(C, P, program, split, BLOCK_C, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    x = x.to(tl.float32)
    if BLOCK_S == 0:
        mean = _group_sum(tl.sum(x, 1), D, BLOCK_C) / (D * P)
        difference = tl.where(mask, x - mean[:, None], 0.0)
        m2 = tl.sum(difference * difference, 1)
    else:
        mean_ptr = stats_ptr + 2 * N.to(tl.int64) * C
        m2_ptr = mean_ptr + N * splits * C
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)[:, None]
            partials = _partials(program, c[None, :], C, s, splits, BLOCK_C)
            count = tl.where(s < splits, tl.minimum(P - s * BLOCK_P, BLOCK_P), 0).to(tl.float32)
            total += tl.sum(tl.load(mean_ptr + partials, mask=s < splits, other=0.0) * count, 0)
        mean = _group_sum(total, D, BLOCK_C) / (D * P)
        # Chan et al. 1983: the tiles' squared differences, and those of their means.
        m2 = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)[:, None]
            partials = _partials(program, c[None, :], C, s, splits, BLOCK_C)
            count = tl.where(s < splits, tl.minimum(P - s * BLOCK_P, BLOCK_P), 0).to(tl.float32)
            shift = tl.load(mean_ptr + partials, mask=s < splits, other=0.0) - mean[None, :]
            m2s = tl.load(m2_ptr + partials, mask=s < splits, other=0.0)
            m2 += tl.sum(m2s + count * shift * shift, 0)
    rstd = 1 / tl.sqrt(_group_sum(m2, D, BLOCK_C) / (D * P) + eps)
    if split == 0:
        tl.store(stats_ptr + row, mean)
        tl.store(stats_ptr + N * C + row, rstd)
    weight = tl.load(weight_ptr + c).to(tl.float32)
    bias = tl.load(bias_ptr + c).to(tl.float32)
    y = (x - mean[:, None]) * rstd[:, None] * weight[:, None] + bias[:, None]
    if RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask, eviction_policy="evict_first")


@triton.jit
def _load_grad(
    grad_y_ptr, x_ptr, y_ptr, stats_ptr, weight, bias_ptr, N, C, c, offsets, mask, row,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The gradient before the ReLU, the normalized x and 1 / std, in float32."""
    rstd = tl.load(stats_ptr + N * C + row)
    mean = tl.load(stats_ptr + row)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    normalized = (x - mean[:, None]) * rstd[:, None]
    if RELU:
        if RESIDUAL:
            positive = tl.load(y_ptr + offsets, mask=mask, other=0.0) > 0
        else:  # computing y again is faster than reading it
            positive = normalized * weight[:, None] + tl.load(bias_ptr + c)[:, None] > 0
        grad = tl.where(positive, grad, 0.0)
    return grad, tl.where(mask, normalized, 0.0), rstd


@triton.jit(do_not_specialize=_NUMBERS)
def _grad_sums_kernel(
    grad_y_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, stats_ptr, sums_ptr, N, C, P_VEC,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Sums over each channel of the tile of the gradient and of gradient * normalized x."""
    P = P_VEC * VEC
    program, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, offsets, mask, row = _tile(C, P, program, split, BLOCK_C, BLOCK_P)
    weight = tl.load(weight_ptr + c).to(tl.float32)
    grad, normalized, _ = _load_grad(
        grad_y_ptr, x_ptr, y_ptr, stats_ptr, weight, bias_ptr, N, C, c, offsets, mask, row,
        RESIDUAL, RELU,
    )  # fmt: skip
    out = _partials(program, c, C, split, splits, BLOCK_C)
    tl.store(sums_ptr + out, tl.sum(grad, 1))
    tl.store(sums_ptr + N.to(tl.int64) * splits * C + out, tl.sum(grad * normalized, 1))


@triton.jit(do_not_specialize=_NUMBERS)
def _grad_input_kernel(
    grad_y_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, stats_ptr, sums_ptr, grad_x_ptr,
    grad_residual_ptr, N, C, P_VEC, VEC: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    P = P_VEC * VEC
    splits = tl.num_programs(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    split = splits - 1 - tl.program_id(1)
    c, offsets, mask, row = _tile(C, P, program, split, BLOCK_C, BLOCK_P)
    weight = tl.load(weight_ptr + c).to(tl.float32)
    grad, normalized, rstd = _load_grad(
        grad_y_ptr, x_ptr, y_ptr, stats_ptr, weight, bias_ptr, N, C, c, offsets, mask, row,
        RESIDUAL, RELU,
    )  # fmt: skip
    dots_ptr = sums_ptr + N.to(tl.int64) * splits * C
    if BLOCK_S == 0:
        total, dot = tl.sum(grad, 1), tl.sum(grad * normalized, 1)
        tl.store(sums_ptr + row, total)
        tl.store(dots_ptr + row, dot)
    else:
        total = tl.zeros((BLOCK_C,), tl.float32)
        dot = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)[:, None]
            partials = _partials(program, c[None, :], C, s, splits, BLOCK_C)
            total += tl.sum(tl.load(sums_ptr + partials, mask=s < splits, other=0.0), 0)
            dot += tl.sum(tl.load(dots_ptr + partials, mask=s < splits, other=0.0), 0)
    mean_grad = _group_sum(total * weight, D, BLOCK_C) / (D * P)
    mean_dot = _group_sum(dot * weight, D, BLOCK_C) / (D * P)
    grad_x = grad * weight[:, None] - mean_grad[:, None] - normalized * mean_dot[:, None]
    grad_x = (grad_x * rstd[:, None]).to(grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + offsets, grad_x, mask=mask, eviction_policy="evict_first")
    if RESIDUAL:
        grad = grad.to(grad_residual_ptr.dtype.element_ty)
        tl.store(grad_residual_ptr + offsets, grad, mask=mask)


def unsupported_reason(x: Tensor, num_groups: int) -> str:
    """Return why :func:`group_norm` cannot run on `x`; "" if it can."""
    d = x.size(1) // num_groups
    if d & (d - 1) or d > 512:
        return f"there is no GroupNorm kernel for groups of {d} channels"
    return ""


@functools.lru_cache(4096)
def _plan(shape: torch.Size, num_groups: int) -> tuple[Any, ...]:
    """
    How the kernels run on a tensor of `shape` (N, C, ...): (N, C, P_VEC), D, the tile (VEC,
    BLOCK_C, BLOCK_P), BLOCK_S, the grid and the number of warps. Tiles are whole groups by all of a
    small map, or a piece of a map.
    """
    n, c = shape[:2]
    d, p = c // num_groups, shape[2:].numel()
    vec = 8 if p % 8 == 0 else 4 if p % 4 == 0 else 1
    block_c, block_p, block_s = d, triton.next_power_of_2(p), 0
    if d * block_p > _WHOLE:
        block_p, block_s = _TILE[vec] // d, max(1, min(128, 1024 // d))
    else:
        # Small groups are taken together, as long as one image is still many blocks.
        while block_c * block_p < 2048 and c % (2 * block_c) == 0 and block_c < 8 * d:
            block_c *= 2
    grid = (n * (c // block_c), triton.cdiv(p, block_p))
    warps = max(1, min(16, block_c * block_p // (32 * _PER_THREAD[vec])))
    return (n, c, p // vec), d, (vec, block_c, block_p), block_s, grid, warps


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """
    ``relu(group_norm(x) + residual)``, with the residual and the ReLU optional.

    `x` is (N, C, ...), float32, float16 or bfloat16; C / num_groups is a power of two. The output
    and the residual have the dtype of `x`; statistics, sums and products are float32. Backward
    keeps `x`, and with both residual and ReLU the output, which the next layer keeps anyway.
    """
    leaves = (x, weight, bias, x if residual is None else residual)
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        return _GroupNorm.apply(x, weight, bias, num_groups, eps, residual, relu)
    return _forward(x.contiguous(), weight, bias, num_groups, eps, residual, relu)[0]


def _forward(x, weight, bias, num_groups, eps, residual, relu) -> tuple[Tensor, Tensor]:
    """The output, and the statistics: (2, N, C), mean and 1 / std, first."""
    numbers, d, tile, block_s, grid, warps = _plan(x.shape, num_groups)
    y = torch.empty_like(x)
    size = 2 * numbers[0] * numbers[1] * (1 + grid[1] if block_s else 1)
    stats = torch.empty(size, dtype=torch.float32, device=x.device)
    with_residual = residual is not None
    residual = x if residual is None else residual.to(x.dtype).contiguous()
    if block_s:
        launch(_moments_kernel, grid, (x, stats), numbers, tile, warps)
    tensors = (x, residual, weight, bias, y, stats)
    constants = (*tile, block_s, d, with_residual, relu)
    launch(_normalize_kernel, grid, tensors, (*numbers, eps), constants, warps)
    return y, stats


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, residual, relu):
        x = x.contiguous()
        y, stats = _forward(x, weight, bias, num_groups, eps, residual, relu)
        with_residual = residual is not None
        ctx.save_for_backward(x, weight, bias, stats, y if relu and with_residual else None)
        ctx.constants = num_groups, with_residual, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y) -> Any:
        x, weight, bias, stats, y = ctx.saved_tensors
        num_groups, *fused = ctx.constants
        numbers, d, tile, block_s, grid, warps = _plan(x.shape, num_groups)
        n, c, _ = numbers
        grad_x = torch.empty_like(x)
        grad_residual = torch.empty_like(x) if fused[0] else None
        sums = torch.empty((2, n * grid[1], c), dtype=torch.float32, device=x.device)
        tensors = (grad_y.contiguous(), x, x if y is None else y, weight, bias, stats, sums)
        if block_s:
            launch(_grad_sums_kernel, grid, tensors, numbers, (*tile, *fused), warps)
        grads = (grad_x, grad_x if grad_residual is None else grad_residual)
        constants = (*tile, block_s, d, *fused)
        launch(_grad_input_kernel, grid, (*tensors, *grads), numbers, constants, warps)
        grad_bias, grad_weight = sums.sum(1).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, grad_residual, None
