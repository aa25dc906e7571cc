"""Conversion of Detectron2 models to GN+WS, and folding of the weights for inference."""

import logging
from itertools import pairwise
from typing import Any

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn

from .blocks import GNWSBasicBlock, GNWSBasicStem, GNWSBottleneckBlock
from .group_norm import GNConv2d, GroupNorm
from .weight_standardization import WSConv2d, standardize_weight_reference

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicStem: GNWSBasicStem,
    BasicBlock: GNWSBasicBlock,
    BottleneckBlock: GNWSBottleneckBlock,
}


def convert_ws_conv(module: nn.Module, kernels: str = "auto") -> nn.Module:
    """
    Turn every convolution in `module` that is followed by a GroupNorm into a :class:`WSConv2d`, in
    place. Parameters and the state dict stay the same.

    The GroupNorm is the ``norm`` of Detectron2's `Conv2d`, or the next layer of an
    :class:`nn.Sequential` (Detectron2's `RetinaNetHead`). Subclasses of `Conv2d` and deformable
    convolutions stay the same, as in MMDetection.

    Args:
        module: a model, or any part of one, of any Detectron2 architecture.
        kernels: "reference" keeps PyTorch's own operators one by one. All else also gives `module`
            the fused GroupNorm and ResNet blocks; see :func:`group_norm` for "auto", "triton" and
            "torch" (config key MODEL.GNWS.KERNELS).

    Returns:
        `module`
    """
    # New modules would not do: Detectron2's FPN and heads also keep theirs in plain lists.
    pairs: list[tuple[Any, Any]] = []
    for m in module.modules():
        if type(m) in (Conv2d, WSConv2d) and isinstance(m.norm, nn.GroupNorm):
            pairs.append((m, m.norm))
        elif isinstance(m, nn.Sequential):
            for conv, norm in pairwise(m):
                if type(conv) in (nn.Conv2d, Conv2d, WSConv2d) and isinstance(norm, nn.GroupNorm):
                    pairs.append((conv, norm))
                    for name in ("norm", "activation"):  # nn.Conv2d has neither
                        setattr(conv, name, getattr(conv, name, None))
    for conv, norm in pairs:
        conv.__class__ = WSConv2d
        conv.kernels = kernels
        if kernels != "reference":
            norm.__class__ = GroupNorm
            norm.kernels = kernels
    for m in module.modules():
        if type(m) in _FUSED and isinstance(m.conv1.norm, GroupNorm):
            m.__class__ = _FUSED[type(m)]
    if not pairs:
        logging.getLogger(__name__).warning(
            f"{type(module).__name__} has no convolution followed by a GroupNorm and stays the "
            'same: build it with "GN" in the NORM keys of its config.'
        )
    return module


@torch.no_grad()
def fold_for_inference(module: nn.Module) -> nn.Module:
    """
    Replace every :class:`WSConv2d` in `module` by a convolution with its standardized weight, in
    place, and return it. The module gives the same outputs without standardizing in each forward,
    and is for inference only: fold a deep copy of a model that is still to be trained or saved.
    The state dict of the result loads into the same model of Detectron2's own layers.
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
