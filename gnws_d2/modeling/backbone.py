"""Detectron2's ResNet and ResNet-FPN backbones with GroupNorm and Weight Standardization."""

from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import check_choice
from ..layers import convert_ws_conv
from ..utils.errors import UserError


@BACKBONE_REGISTRY.register()
def build_resnet_gnws_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    Build Detectron2's :func:`build_resnet_backbone` with every convolution weight-standardized. It
    maps (N, C, H, W) images to ``{name: feature}`` for ``MODEL.RESNETS.OUT_FEATURES``.

    Args:
        cfg: reads ``MODEL.RESNETS.*``, ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.GNWS.*``.
        input_shape: its ``channels`` is the number of channels of the image.

    Raises:
        UserError: see :func:`check_keys`.
    """
    kernels = check_keys(cfg, "RESNETS")
    backbone = build_resnet_backbone(cfg, input_shape)
    _initialize(backbone, cfg)
    return convert_ws_conv(backbone, kernels)


@BACKBONE_REGISTRY.register()
def build_resnet_gnws_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Build Detectron2's :func:`build_resnet_fpn_backbone` with every convolution, also of the FPN,
    weight-standardized. It maps (N, C, H, W) images to ``{"p2": ..., "p6": ...}``. Also reads
    ``MODEL.FPN.*``; otherwise see :func:`build_resnet_gnws_backbone`.
    """
    kernels = check_keys(cfg, "RESNETS", "FPN")
    backbone = build_resnet_fpn_backbone(cfg, input_shape)
    _initialize(backbone.bottom_up, cfg)
    return convert_ws_conv(backbone, kernels)


def _initialize(resnet: ResNet, cfg: CfgNode) -> None:
    if starts_from_scratch(cfg):
        for block in resnet.modules():
            if isinstance(block, CNNBlockBase) and not isinstance(block, BasicStem):
                last = block.conv2 if isinstance(block, BasicBlock) else block.conv3
                nn.init.zeros_(last.norm.weight)


def starts_from_scratch(cfg: CfgNode) -> bool:
    """Return whether ``MODEL.GNWS.SCRATCH_INIT`` applies: there are no weights to load."""
    return "GNWS" in cfg.MODEL and cfg.MODEL.GNWS.SCRATCH_INIT and not cfg.MODEL.WEIGHTS


def checkpoint_activations(backbone: nn.Module) -> None:
    """
    Have the residual blocks of a ResNet keep only their inputs in training, and compute the rest
    again in the backward pass (:func:`torch.utils.checkpoint.checkpoint`;
    ``MODEL.BACKBONE.ACTIVATION_CHECKPOINTING``). The gradients stay the same.
    """
    for module in backbone.modules():
        if isinstance(module, CNNBlockBase) and not isinstance(module, BasicStem):
            module.forward = partial(_recompute, module.forward)


def _recompute(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x)
    return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)


def check_keys(cfg: CfgNode, *sections: str) -> str:
    """
    Return ``MODEL.GNWS.KERNELS``, "auto" by default. Raise :class:`UserError` if it is unknown, or
    if the ``NORM`` of one of the `sections` of ``cfg.MODEL`` is not "GN" (Detectron2's defaults are
    frozen BatchNorm and none).
    """
    for section in sections:
        key, norm = f"MODEL.{section}.NORM", cfg.MODEL[section].NORM
        if norm != "GN":
            raise UserError(f'{key} is "{norm}", but a GN+WS model needs GroupNorm: set {key} GN.')
    kernels = cfg.MODEL.GNWS.KERNELS if "GNWS" in cfg.MODEL else "auto"
    check_choice("MODEL.GNWS.KERNELS", kernels, ("auto", "triton", "torch", "reference"))
    return kernels
