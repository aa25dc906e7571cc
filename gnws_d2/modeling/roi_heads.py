"""Detectron2's box and mask heads with GroupNorm and Weight Standardization."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import nn

from ..layers import WSConv2d, convert_ws_conv
from .keys import check_group_norm, get_kernels


def _convert(head: nn.Module, kernels: str) -> None:
    for m in convert_ws_conv(head, kernels).modules():
        if isinstance(m, WSConv2d):
            m.channels_last = True


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCGNWSHead(FastRCNNConvFCHead):
    """
    :class:`FastRCNNConvFCHead` with its convolutions weight-standardized. Same arguments, and
    ``MODEL.ROI_BOX_HEAD.*`` keys; UserError if ``MODEL.ROI_BOX_HEAD.NORM`` is not "GN".
    """

    @configurable
    def __init__(self, *args, kernels: str = "auto", **kwargs):
        """`kernels`: see :func:`convert_ws_conv`."""
        super().__init__(*args, **kwargs)
        _convert(self, kernels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        check_group_norm("MODEL.ROI_BOX_HEAD.NORM", cfg.MODEL.ROI_BOX_HEAD.NORM)
        return {**super().from_config(cfg, input_shape), "kernels": get_kernels(cfg)}


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleGNWSHead(MaskRCNNConvUpsampleHead):
    """
    :class:`MaskRCNNConvUpsampleHead` with its convolutions, but not its deconvolution and
    predictor, weight-standardized. Same arguments, and ``MODEL.ROI_MASK_HEAD.*`` keys; UserError
    if ``MODEL.ROI_MASK_HEAD.NORM`` is not "GN".
    """

    @configurable
    def __init__(self, *args, kernels: str = "auto", **kwargs):
        """`kernels`: see :func:`convert_ws_conv`."""
        super().__init__(*args, **kwargs)
        _convert(self, kernels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        check_group_norm("MODEL.ROI_MASK_HEAD.NORM", cfg.MODEL.ROI_MASK_HEAD.NORM)
        return {**super().from_config(cfg, input_shape), "kernels": get_kernels(cfg)}
