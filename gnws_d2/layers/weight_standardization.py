"""Weight Standardization (Qiao et al. 2019, arXiv:1903.10520): the operation, the convolution."""

from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from .group_norm import GroupNorm, autocast_dtype
from .kernels import use_triton


def standardize_weight(
    weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """
    Standardize every filter of a convolution weight to mean 0 and standard deviation 1:
    ``(W - mean(W)) / (std(W) + eps)``, with the unbiased std and ``eps`` added to it, as in MMCV's
    ``ConvWS2d``. For backward nothing is kept but the output, which the convolution keeps too, and
    the std of each filter.

    A filter whose values are all equal (one with a single value included) becomes zeros, with
    finite gradients.

    Args:
        weight: (C_out, C_in / groups, kH, kW), floating point.
        eps: added to the standard deviation.
        dtype: of the output; by default that of `weight`.

    Returns:
        A tensor of the shape of `weight`. Statistics are computed in float32 at least.
    """
    dtype = dtype or weight.dtype
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StandardizeWeight.apply(weight, eps, dtype)
    return _standardize(weight, eps, dtype)[0]


def standardize_weight_reference(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula of :func:`standardize_weight` as it stands, for its arguments and output."""
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    # A large common offset would eat the digits of the statistics below; it changes nothing else.
    w = w - w.mean(dim=1, keepdim=True)
    std, mean = torch.std_mean(w, dim=1, correction=min(1, w.size(1) - 1), keepdim=True)
    return ((w - mean) / (std + eps)).view_as(weight).to(weight.dtype)


def _standardize(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The standardized weight, and the (C_out, 1) std."""
    if _use_triton(weight):
        from .kernels import weight_standardization as kernels

        return kernels.standardize(weight, eps, dtype)
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    w = w - w[:, :1]  # a large common offset would eat the digits of the mean
    w -= w.mean(dim=1, keepdim=True)
    # torch.std takes ten times as long.
    std = torch.linalg.vector_norm(w, dim=1, keepdim=True) / max(1, w.size(1) - 1) ** 0.5
    w *= 1 / (std + eps)
    return w.view_as(weight).to(dtype), std


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, std = _standardize(weight, eps, dtype)
        ctx.save_for_backward(out, std)
        ctx.eps, ctx.dtype = eps, weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out, std = ctx.saved_tensors
        if _use_triton(out):
            from .kernels import weight_standardization as kernels

            return kernels.standardize_backward(grad, out, std, ctx.eps, ctx.dtype), None, None
        g, y = (x.to(std.dtype).flatten(1) for x in (grad, out))
        n = g.size(1)
        # grad_weight = (g - mean(g) - y * sum(g * y) / (n - 1) * (std + eps) / std) / (std + eps)
        # is what the fused backward of layer norm computes of y, with this in place of its rstd.
        std_eps = std + ctx.eps
        rstd = (n / max(1, n - 1) * std_eps / std.clamp(min=1e-30)).sqrt()
        g, *_ = torch.ops.aten.native_layer_norm_backward(
            g, y, [n], torch.zeros_like(rstd), rstd, None, None, [True, False, False]
        )
        g *= 1 / (std_eps * rstd)
        return g.view_as(out).to(ctx.dtype), None, None


def _use_triton(weight: Tensor) -> bool:
    if not use_triton(weight):
        return False
    from .kernels.weight_standardization import reason_not

    return use_triton(weight, reason_not(weight))


# PyTorch's fused optimizers, and others that write through `.data`, leave the version as it is.
_optimizer_steps = 0


def _count_step(*args: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class WSConv2d(Conv2d):
    """
    Detectron2's :class:`Conv2d` with its weight passed through :func:`standardize_weight` on each
    forward. Arguments, ``norm``, ``activation`` and the names in the state dict are the same, so a
    checkpoint of either class loads into the other.

    In evaluation mode without gradients the standardized weight is kept, and computed again when
    the weight has changed. The one change that PyTorch cannot see is a write through
    ``weight.data`` in evaluation mode: call ``eval()`` on the model after it.
    """

    kernels = "auto"
    # Whether to convolve in channels-last in evaluation on a CPU. It is faster, but adds up in
    # another order: deep networks amplify the rounding until scores differ by over 1e-5.
    channels_last = False
    _standardized: tuple[tuple, Tensor, Tensor] | None = None

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone, of (N, C_in, H, W), without the norm and the activation."""
        if torch.jit.is_scripting():
            weight = standardize_weight_reference(self.weight)
        else:
            weight = self.standardized_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, C_in, H, W); N may be 0.

        Returns:
            (N, C_out, H_out, W_out), after the norm and the activation, if any.
        """
        x = self.convolve(x)
        if not torch.jit.is_scripting():
            if isinstance(self.norm, GroupNorm) and isinstance(self.activation, nn.ReLU):
                return self.norm(x, relu=True)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    @torch.jit.unused
    def standardized_weight(self) -> Tensor:
        """
        Returns:
            The weight of the convolution, in the dtype that autocast, if on, gives it.
        """
        weight = self.weight
        if self.kernels == "reference":
            return standardize_weight_reference(weight)
        dtype = weight.dtype
        if dtype != torch.float64:  # which autocast leaves alone
            dtype = autocast_dtype(weight.device) or dtype
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or weight.is_inference()  # has no version
        ):
            return standardize_weight(weight, dtype=dtype)
        key = (weight.data_ptr(), weight._version, _optimizer_steps, dtype)
        if self._standardized is None or self._standardized[0] != key:
            # The formula's own rounding, for once: the fast operation's differs in the last digit,
            # which R-101 amplifies until its features differ by over 2e-5.
            out = standardize_weight_reference(weight).to(dtype)
            if self.channels_last and weight.device.type == "cpu":
                out = out.contiguous(memory_format=torch.channels_last)
            # With the weight itself, so that no other one can take its address.
            self._standardized = key, weight.detach(), out
        return self._standardized[2]

    def train(self, mode: bool = True) -> "WSConv2d":
        self._standardized = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._standardized = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_standardized"}
