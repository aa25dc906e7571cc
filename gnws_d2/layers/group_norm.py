"""Group Normalization (Wu and He 2018, arXiv:1803.08494), with the residual and ReLU after it."""

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels.choice import find_kernels


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
        kernels: on a GPU, "auto" runs Triton kernels where they can run and PyTorch's own operators
            elsewhere (:mod:`gnws_d2.layers.kernels.choice`); "torch" always runs PyTorch's own
            operators; with "triton" it is an error if the kernels cannot run.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        UserError: see `kernels`.
    """
    triton = find_kernels("group_norm", kernels, x, x.dtype, num_groups)
    if triton is not None:
        return triton.group_norm(x, num_groups, weight, bias, eps, residual, relu)
    if autocast_dtype(x.device) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return group_norm(x, num_groups, weight, bias, eps, residual, relu, "torch")
    x = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if residual is not None:
        x += residual
    return F.relu_(x) if relu else x


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
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, residual, relu, self.kernels
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
