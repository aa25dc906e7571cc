"""Group Normalization (Wu and He 2018, arXiv:1803.08494), with the residual and ReLU after it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels.choice import can_choose, fastest, get_kernels


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """
    Compute ``relu(group_norm(x) + residual)``, with the residual and the ReLU optional.

    Half precision stays half precision, also in autocast, which would run
    :func:`torch.nn.functional.group_norm` in float32. Statistics are float32 at least.

    Args:
        x: (N, C, ...), floating point; N may be 0.
        num_groups: divides C.
        weight, bias: (C,)
        eps: added to the variance.
        residual: of the shape of `x`.
        relu: whether to apply the ReLU.
        kernels: on a GPU, "auto" runs what is fastest for this shape, PyTorch's own operators or
            Triton kernels; "triton" and "torch" run one of them.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    if not torch.jit.is_scripting():
        if kernels != "torch":
            run = _choose(kernels, x, num_groups, weight, bias, eps, residual, relu)
            if run is not None:
                return run(x, num_groups, weight, bias, eps, residual, relu)
        if autocast_dtype(x.device) is not None:
            with torch.autocast(x.device.type, enabled=False):
                return group_norm(x, num_groups, weight, bias, eps, residual, relu, "torch")
    x = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if residual is not None:
        x += residual
    return F.relu_(x) if relu else x


# By shape and options, what to run; None for PyTorch's operators on the tensor as it is.
_chosen: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}


def _choose(kernels: str, x: Tensor, num_groups: int, *args: Any) -> Callable[..., Tensor] | None:
    """What to run with these arguments; None for PyTorch's operators on `x` as it is."""
    if not can_choose(x):
        return None
    _, _, _, residual, relu = args
    grad = torch.is_grad_enabled()
    options = (num_groups, residual is not None, relu, grad, x.is_contiguous(), kernels)
    key = (x.shape, x.dtype, x.device, *options)
    try:
        return _chosen[key]
    except KeyError:
        pass
    if len(_chosen) > 10_000:  # of images of thousands of sizes
        _chosen.clear()
    triton = get_kernels("group_norm", x, num_groups)
    if triton is None:
        _chosen[key] = None
    elif kernels == "triton":
        _chosen[key] = triton.group_norm
    else:
        functions = {"triton": triton.group_norm, "torch": None, "channels-last": _channels_last}
        candidates = {
            name: partial(_try, function or _torch, grad, x, num_groups, *args)
            for name, function in functions.items()
        }
        sizes = [n.bit_length() for n in x.shape]  # in powers of two
        name = fastest(("group_norm", *sizes, *key[1:]), candidates, x.device)
        _chosen[key] = functions[name]
    return _chosen[key]


_torch: Callable[..., Tensor] = partial(group_norm, kernels="torch")


def _channels_last(x: Tensor, *args: Any) -> Tensor:
    return _torch(x.contiguous(memory_format=torch.channels_last), *args)


def _try(function: Callable[..., Tensor], grad: bool, *args: Any) -> None:
    """Run forward, and backward where gradients are on, apart from the caller's graph."""
    args = tuple(a.detach().requires_grad_(grad) if isinstance(a, Tensor) else a for a in args)
    with torch.set_grad_enabled(grad):
        y = function(*args)
    if grad:
        torch.autograd.grad(y, [a for a in args if isinstance(a, Tensor)], y.detach())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast computes in on `device`, or None if it is off."""
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` by :func:`group_norm`."""

    kernels = "auto"

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """See :func:`group_norm`."""
        kernels = "torch"
        if not torch.jit.is_scripting():  # which sees no attributes of the class
            kernels = self.kernels
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, residual, relu, kernels
        )


class GNConv2d(Conv2d):
    """
    Detectron2's :class:`Conv2d` with its :class:`GroupNorm`, and the residual and ReLU after it,
    in one operation. Any other norm or activation works as in :class:`Conv2d`.
    """

    # Whether fold_for_inference stores the weight in channels-last on a CPU. It is faster, but adds
    # in another order: deep networks amplify the rounding until scores differ by over 1e-5.
    channels_last = False

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """
        Args:
            x: (N, C_in, H, W); N may be 0.
            residual: added to the output, of its shape.
            relu: whether to apply a ReLU after that.

        Returns:
            (N, C_out, H_out, W_out), after the norm and the activation, if any.
        """
        weight = self.get_weight()
        x = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if not torch.jit.is_scripting():
            if isinstance(self.norm, GroupNorm):
                if self.activation is None:
                    return self.norm(x, residual, relu)
                if isinstance(self.activation, nn.ReLU) and residual is None:
                    return self.norm(x, relu=True)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        if residual is not None:
            x = x + residual
        return F.relu(x) if relu else x

    def get_weight(self) -> Tensor:
        """Return the weight to convolve with."""
        return self.weight
