"""Weight Standardization (Qiao et al. 2019, arXiv:1903.10520): the operation, the convolution."""

import logging
from itertools import pairwise

import torch
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d
from detectron2.layers.batch_norm import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

_NORM_LAYERS = (
    nn.GroupNorm,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    CycleBatchNormList,
    LayerNorm,
)


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """
    Standardize every filter of a convolution weight to mean 0 and standard deviation 1:
    ``(W - mean(W)) / (std(W) + eps)``, with the unbiased std and ``eps`` added to it, as in MMCV's
    ``ConvWS2d``.

    A filter whose values are all equal (one with a single value included) becomes zeros, with
    finite gradients.

    Args:
        weight: (C_out, C_in / groups, kH, kW), floating point.
        eps: added to the standard deviation.

    Returns:
        A tensor of the shape and dtype of `weight`. Statistics are computed in float32 at least.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    # A large common offset would eat the digits of the statistics below; it changes nothing else.
    w = w - w.mean(dim=1, keepdim=True)
    std, mean = torch.std_mean(w, dim=1, correction=min(1, w.size(1) - 1), keepdim=True)
    return ((w - mean) / (std + eps)).view_as(weight).to(weight.dtype)


class WSConv2d(Conv2d):
    """
    Detectron2's :class:`Conv2d` with its weight passed through :func:`standardize_weight` on each
    forward. Arguments, ``norm``, ``activation`` and the names in the state dict are the same, so a
    checkpoint of either class loads into the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, C_in, H, W); N may be 0.

        Returns:
            (N, C_out, H_out, W_out), after the norm and the activation, if any.
        """
        weight = standardize_weight(self.weight)
        x = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def convert_ws_conv(module: nn.Module) -> nn.Module:
    """
    Turn every normalized convolution in `module` into a :class:`WSConv2d`, in place.

    A convolution is normalized if it has a ``norm`` (Detectron2's `Conv2d`) or if the next layer
    of the same :class:`nn.Sequential` is one (Detectron2's `RetinaNetHead`). `FrozenBatchNorm2d`
    is none: it is a fixed affine map, after which standardized weights would let the activations
    explode. Convolutions with a forward of their own (deformable ones, as in MMDetection, and
    subclasses of `Conv2d`) are left alone. Parameters and the state dict stay as they are.

    Args:
        module: a model, or any part of one, of any Detectron2 architecture.

    Returns:
        `module`
    """
    for m in module.modules():
        if type(m) is Conv2d and not isinstance(m.norm, (FrozenBatchNorm2d, type(None))):
            # Detectron2's FPN and heads also keep their convolutions in plain lists, which new
            # modules in place of the old ones would not reach.
            m.__class__ = WSConv2d
        elif isinstance(m, nn.Sequential):
            for conv, norm in pairwise(m):
                if type(conv) in (nn.Conv2d, Conv2d) and isinstance(norm, _NORM_LAYERS):
                    conv.__class__ = WSConv2d
                    for name in ("norm", "activation"):  # which nn.Conv2d has not
                        setattr(conv, name, getattr(conv, name, None))
    if not any(isinstance(m, WSConv2d) for m in module.modules()):
        logging.getLogger(__name__).warning(
            f"{type(module).__name__} has no convolution followed by a norm, and stays as it is: "
            'build it with "GN" in the NORM keys of its config.'
        )
    return module


@torch.no_grad()
def fold_ws_conv(module: nn.Module) -> nn.Module:
    """
    Turn every :class:`WSConv2d` in `module` into a :class:`Conv2d` with the standardized weights,
    in place: the same outputs without weight standardization, for deployment. Training it on is
    training a plain GN model.

    Returns:
        `module`
    """
    for m in module.modules():
        if isinstance(m, WSConv2d):
            m.weight.copy_(standardize_weight(m.weight))
            m.__class__ = Conv2d
    return module
