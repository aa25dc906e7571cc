"""GN+WS in any Detectron2 model, and out of it again."""

import logging
from itertools import pairwise

import torch
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d
from detectron2.layers.batch_norm import LayerNorm
from torch import nn

from .fuse import fuse_layers, unfuse_layers
from .weight_standardization import WSConv2d, standardize_weight_reference

_NORM_LAYERS = (
    nn.GroupNorm,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    CycleBatchNormList,
    LayerNorm,
)


def convert_ws_conv(module: nn.Module, kernels: str = "auto") -> nn.Module:
    """
    Turn every normalized convolution in `module` into a :class:`WSConv2d`, in place.

    A convolution is normalized if it has a ``norm`` (Detectron2's `Conv2d`) or if the next layer
    of the same :class:`nn.Sequential` is one (Detectron2's `RetinaNetHead`). `FrozenBatchNorm2d`
    is none: it is a fixed affine map, after which standardized weights would let the activations
    explode. Convolutions with a forward of their own (deformable ones, as in MMDetection, and
    subclasses of `Conv2d`) are left alone. Parameters and the state dict stay as they are.

    Args:
        module: a model, or any part of one, of any Detectron2 architecture.
        kernels: "auto" also gives `module` the fast GroupNorm and ResNet blocks; "reference"
            leaves it with PyTorch's own operators one by one (config key MODEL.GNWS.KERNELS).

    Returns:
        `module`
    """
    # In place of the old modules new ones would not do: Detectron2's FPN and heads also keep their
    # convolutions in plain lists.
    for m in module.modules():
        if type(m) is Conv2d and not isinstance(m.norm, (FrozenBatchNorm2d, type(None))):
            m.__class__ = WSConv2d
        elif isinstance(m, nn.Sequential):
            for conv, norm in pairwise(m):
                if type(conv) in (nn.Conv2d, Conv2d) and isinstance(norm, _NORM_LAYERS):
                    conv.__class__ = WSConv2d
                    for name in ("norm", "activation"):  # which nn.Conv2d has not
                        setattr(conv, name, getattr(conv, name, None))
    for m in module.modules():
        if isinstance(m, WSConv2d):
            m.kernels = kernels
    if kernels == "auto":
        fuse_layers(module)
    if not any(isinstance(m, WSConv2d) for m in module.modules()):
        logging.getLogger(__name__).warning(
            f"{type(module).__name__} has no convolution followed by a norm, and stays as it is: "
            'build it with "GN" in the NORM keys of its config.'
        )
    return module


@torch.no_grad()
def fold_ws_conv(module: nn.Module) -> nn.Module:
    """
    Undo :func:`convert_ws_conv`, but with standardized weights, in place: Detectron2's modules,
    the same outputs without weight standardization, for deployment. Training it on is training a
    plain GN model.

    Returns:
        `module`
    """
    unfuse_layers(module)
    for m in module.modules():
        if isinstance(m, WSConv2d):
            # With the formula's own rounding, as a model in evaluation keeps its weights.
            m.weight.copy_(standardize_weight_reference(m.weight))
            m.__class__ = Conv2d
    return module
