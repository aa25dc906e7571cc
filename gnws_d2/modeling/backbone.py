"""Detectron2's ResNet and ResNet-FPN backbones with GroupNorm and Weight Standardization."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

from ..layers import convert_ws_conv
from ..utils.memory import keep_freed_memory
from .keys import check_group_norm, get_kernels


@BACKBONE_REGISTRY.register()
def build_resnet_gnws_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    Detectron2's :func:`build_resnet_backbone` with every convolution weight-standardized.

    Args:
        cfg: reads ``MODEL.RESNETS.*``, ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.GNWS.KERNELS``.
        input_shape: its ``channels`` are those of the image.

    Returns:
        A backbone from (N, C, H, W) images to ``{name: feature}`` for
        ``MODEL.RESNETS.OUT_FEATURES``.

    Raises:
        UserError: if ``MODEL.RESNETS.NORM`` is not "GN", or ``MODEL.GNWS.KERNELS`` is unknown.
    """
    check_group_norm("MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM)
    return _convert(build_resnet_backbone(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_resnet_gnws_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Detectron2's :func:`build_resnet_fpn_backbone` with every convolution, those of the FPN
    included, weight-standardized.

    Args:
        cfg: reads ``MODEL.FPN.*`` besides the keys of :func:`build_resnet_gnws_backbone`.
        input_shape: its ``channels`` are those of the image.

    Returns:
        A backbone from (N, C, H, W) images to ``{"p2": ..., "p6": ...}``.

    Raises:
        UserError: if ``MODEL.RESNETS.NORM`` or ``MODEL.FPN.NORM`` is not "GN", or
            ``MODEL.GNWS.KERNELS`` is unknown.
    """
    check_group_norm("MODEL.RESNETS.NORM", cfg.MODEL.RESNETS.NORM)
    check_group_norm("MODEL.FPN.NORM", cfg.MODEL.FPN.NORM)
    return _convert(build_resnet_fpn_backbone(cfg, input_shape), cfg)


def _convert(backbone: Backbone, cfg: CfgNode) -> Any:
    kernels = get_kernels(cfg)
    if cfg.MODEL.DEVICE == "cpu" and kernels == "auto":
        keep_freed_memory()
    return convert_ws_conv(backbone, kernels)
