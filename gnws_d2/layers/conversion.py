"""Conversion of Detectron2 models to GN+WS, and back to plain GN with the weights folded."""

import logging
from itertools import pairwise
from typing import Any

import torch
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn

from ..utils.compat import LayerNorm
from .blocks import GNWSBasicBlock, GNWSBasicStem, GNWSBottleneckBlock
from .group_norm import GNConv2d, GroupNorm
from .weight_standardization import WSConv2d, standardize_weight_reference

_NORM_LAYERS = (nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, CycleBatchNormList, LayerNorm)
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    BasicStem: GNWSBasicStem,
    BasicBlock: GNWSBasicBlock,
    BottleneckBlock: GNWSBottleneckBlock,
}


def convert_ws_conv(module: nn.Module, kernels: str = "auto") -> nn.Module:
    """
    Turn every convolution in `module` that is followed by a norm into a :class:`WSConv2d`, in
    place. Parameters and the state dict stay the same.

    The norm is the ``norm`` of Detectron2's `Conv2d`, or the next layer of an
    :class:`nn.Sequential` (Detectron2's `RetinaNetHead`). `FrozenBatchNorm2d` does not count: it is
    a fixed affine map, after which standardized weights would let the activations explode.
    Subclasses of `Conv2d` and deformable convolutions stay the same, as in MMDetection.

    TorchScript compiles the result wherever it compiles Detectron2's own model; for backbones,
    ``import detectron2.export.torchscript`` first, as for Detectron2's.

    Args:
        module: a model, or any part of one, of any Detectron2 architecture.
        kernels: "reference" keeps PyTorch's own operators one by one. All else also gives `module`
            the fused GroupNorm and ResNet blocks; see :func:`group_norm` for "auto", "triton" and
            "torch" (config key MODEL.GNWS.KERNELS).

    Returns:
        `module`
    """
    # New modules would not do: Detectron2's FPN and heads also keep theirs in plain lists.
    convs: list[Any] = []
    for m in module.modules():
        has_norm = type(m) is Conv2d and not isinstance(m.norm, (FrozenBatchNorm2d, type(None)))
        if has_norm or isinstance(m, WSConv2d):
            convs.append(m)
        elif isinstance(m, nn.Sequential):
            for conv, norm in pairwise(m):
                if type(conv) in (nn.Conv2d, Conv2d) and isinstance(norm, _NORM_LAYERS):
                    convs.append(conv)
                    for name in ("norm", "activation"):  # nn.Conv2d has neither
                        setattr(conv, name, getattr(conv, name, None))
    for conv in convs:
        conv.__class__ = WSConv2d
        conv.kernels = kernels
    if kernels != "reference":
        for m in module.modules():
            if type(m) in _FUSED and getattr(m, "affine", True) and _is_fusible(m):
                m.__class__ = _FUSED[type(m)]
            if isinstance(m, GroupNorm):
                m.kernels = kernels
    if not convs:
        logging.getLogger(__name__).warning(
            f"{type(module).__name__} has no convolution followed by a norm and stays the same: "
            'build it with "GN" in the NORM keys of its config.'
        )
    return module


@torch.no_grad()
def fold_for_inference(module: nn.Module) -> nn.Module:
    """
    Replace every :class:`WSConv2d` in `module` by a convolution with its standardized weight, in
    place. The module gives the same outputs without standardizing in each forward, and is for
    inference only: fold a deep copy of a model that is still to be trained or saved.

    Returns:
        `module`
    """
    for m in module.modules():
        if isinstance(m, WSConv2d):
            # The fast operation differs from the formula in the last digit, which R-101 amplifies
            # until its features differ by over 2e-5.
            weight = standardize_weight_reference(m.weight)
            if m.channels_last and weight.device.type == "cpu":
                weight = weight.contiguous(memory_format=torch.channels_last)
            m.weight = nn.Parameter(weight, m.weight.requires_grad)
            m.__class__ = GNConv2d
    return module


def fold_ws_conv(module: nn.Module) -> nn.Module:
    """
    Undo :func:`convert_ws_conv`, but with standardized weights, in place. The module gives the same
    outputs with Detectron2's own layers, for deployment; training it is training a plain GN model.

    Returns:
        `module`
    """
    stock = {fused: plain for plain, fused in [*_FUSED.items(), (Conv2d, GNConv2d)]}
    for m in fold_for_inference(module).modules():
        if isinstance(m, GNConv2d):
            m.weight.data = m.weight.data.contiguous()
        m.__class__ = stock.get(type(m), type(m))
    return module


def _is_fusible(module: nn.Module) -> bool:
    """True if every convolution in `module` is a :class:`GNConv2d` with a GroupNorm."""
    return all(
        isinstance(m, GNConv2d) and isinstance(m.norm, nn.GroupNorm)
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
    )
