"""Group Normalization (Wu and He 2018, arXiv:1803.08494), with the residual and ReLU after it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import use_triton


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """
    ``relu(group_norm(x) + residual)``, the residual and the ReLU where they are asked for.

    Half precision stays half precision, in autocast too, which would send
    :func:`torch.nn.functional.group_norm` through float32. Statistics are float32 at least.

    Args:
        x: (N, C, ...), floating point; N may be 0.
        num_groups: divides C.
        weight, bias: (C,)
        eps: added to the variance.
        residual: of the shape of `x`.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    if _use_triton(x, num_groups):
        from .kernels.group_norm import GroupNormFunction

        return GroupNormFunction.apply(x, weight, bias, num_groups, eps, residual, relu)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if autocast_dtype(x.device) is None:
        x = F.group_norm(x, num_groups, weight, bias, eps)
    else:
        with torch.autocast(x.device.type, enabled=False):
            x = F.group_norm(x, num_groups, weight, bias, eps)
    if residual is not None:
        x += residual
    return F.relu_(x) if relu else x


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """
    Returns:
        The type that autocast computes in on `device`; None where it is off.
    """
    available = torch.amp.is_autocast_available(device.type)
    if not (available and torch.is_autocast_enabled(device.type)):
        return None
    return torch.get_autocast_dtype(device.type)


def _use_triton(x: Tensor, num_groups: int) -> bool:
    if not use_triton(x):
        return False
    from .kernels.group_norm import reason_not

    return use_triton(x, reason_not(x, num_groups))


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` by :func:`group_norm`."""

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """See :func:`group_norm`."""
        if torch.jit.is_scripting():
            x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            x = x if residual is None else x + residual
            return F.relu(x) if relu else x
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, residual, relu)
