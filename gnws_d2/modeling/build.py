"""Detectron2's model builder, with the fast layers in all of the model."""

import detectron2.modeling
from detectron2.config import CfgNode
from torch import nn

from ..layers import fuse_layers
from .keys import get_kernels


def build_model(cfg: CfgNode) -> nn.Module:
    """
    Detectron2's :func:`build_model`, and :func:`fuse_layers` on what it builds: not only the parts
    that this project registers, but ROIAlign, too.

    Raises:
        UserError: if ``MODEL.GNWS.KERNELS`` is unknown.
    """
    model = detectron2.modeling.build_model(cfg)
    return fuse_layers(model) if get_kernels(cfg) == "auto" else model
