"""Weight Standardization (Qiao et al. 2019, arXiv:1903.10520) and the convolution that uses it."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group_norm import GNConv2d, autocast_dtype
from .kernels.choice import find_kernels


def standardize_weight(
    weight: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> Tensor:
    """
    Standardize every filter of a convolution weight to mean 0 and standard deviation 1:
    ``(W - mean(W)) / (std(W) + eps)``, with the unbiased std and ``eps`` added to it, as in MMCV's
    ``ConvWS2d``. Backward keeps only the output, which the convolution keeps too, and the std of
    each filter.

    A filter whose values are all equal, or that has a single value, becomes zeros with finite
    gradients.

    Args:
        weight: (C_out, C_in / groups, kH, kW), floating point.
        eps: added to the standard deviation.
        dtype: of the output; by default the dtype of `weight`.
        kernels: see :func:`group_norm`.

    Returns:
        A tensor of the shape of `weight`. Statistics are computed in float32 at least.

    Raises:
        UserError: if `kernels` is "triton" and the kernels cannot run.
    """
    dtype = dtype or weight.dtype
    if torch.jit.is_tracing():  # a trace has no autograd functions
        return standardize_weight_reference(weight, eps).to(dtype)
    triton = find_kernels("weight_standardization", kernels, weight, dtype)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StandardizeWeight.apply(weight, eps, dtype, triton)
    return _standardize(weight, eps, dtype, triton)[0]


def standardize_weight_reference(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute :func:`standardize_weight` by its formula, with PyTorch's operators one by one."""
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    # A large common offset would cost the statistics below digits, and has no other effect.
    w = w - w.mean(dim=1, keepdim=True)
    std, mean = torch.std_mean(w, dim=1, correction=min(1, w.size(1) - 1), keepdim=True)
    return ((w - mean) / (std + eps)).view_as(weight).to(weight.dtype)


def _standardize(
    weight: Tensor, eps: float, dtype: torch.dtype, triton: ModuleType | None
) -> tuple[Tensor, Tensor]:
    """The standardized weight, and the (C_out, 1) std."""
    if triton is not None:
        return triton.standardize(weight, eps, dtype)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    w = w - w[:, :1]  # a large common offset would cost the mean digits
    w -= w.mean(dim=1, keepdim=True)
    # torch.std takes ten times as long.
    std = torch.linalg.vector_norm(w, dim=1, keepdim=True) / max(1, w.size(1) - 1) ** 0.5
    w *= 1 / (std + eps)
    return w.view_as(weight).to(dtype), std


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, eps: float, dtype: torch.dtype, triton: ModuleType | None
    ) -> Tensor:
        out, std = _standardize(weight, eps, dtype, triton)
        ctx.save_for_backward(out, std)
        ctx.eps, ctx.dtype, ctx.triton = eps, weight.dtype, triton
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out, std = ctx.saved_tensors
        if ctx.triton is not None:
            g = ctx.triton.standardize_backward(grad, out, std, ctx.eps, ctx.dtype)
            return g, None, None, None
        g, y = (x.to(std.dtype).flatten(1) for x in (grad, out))
        n = g.size(1)
        # grad_weight = (g - mean(g) - y * sum(g * y) / (n - 1) * (std + eps) / std) / (std + eps)
        # is what the fused backward of layer norm computes from y with this rstd.
        std_eps = std + ctx.eps
        rstd = (n / max(1, n - 1) * std_eps / std.clamp(min=1e-30)).sqrt()
        g, *_ = torch.ops.aten.native_layer_norm_backward(
            g, y, [n], torch.zeros_like(rstd), rstd, None, None, [True, False, False]
        )
        g *= 1 / (std_eps * rstd)
        return g.view_as(out).to(ctx.dtype), None, None, None


class WSConv2d(GNConv2d):
    """
    Detectron2's :class:`Conv2d` with its weight passed through :func:`standardize_weight` in each
    forward, in training and evaluation. Arguments, ``norm``, ``activation`` and the names in the
    state dict are the same, so a checkpoint of either class loads into the other.
    :func:`fold_for_inference` saves the time in models that only predict.
    """

    kernels = "auto"

    def get_weight(self) -> Tensor:
        """Return the standardized weight, in the dtype of autocast if that is on."""
        if self.kernels == "reference":
            return standardize_weight_reference(self.weight)
        dtype = self.weight.dtype
        if dtype != torch.float64:  # which autocast does not cast
            dtype = autocast_dtype(self.weight.device) or dtype
        return standardize_weight(self.weight, dtype=dtype, kernels=self.kernels)
