"""Detectron2's box and mask heads with GroupNorm and Weight Standardization."""

from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import nn

from ..layers import WSConv2d, convert_ws_conv
from .backbone import check_keys, starts_from_scratch


class _GNWSHead(nn.Module):
    """Mixin for Detectron2's heads. Reads ``MODEL.<section>.*``, where ``NORM`` has to be "GN"."""

    section: str

    @configurable
    def __init__(self, *args, kernels: str = "auto", **kwargs):
        """As in the head of Detectron2. `kernels`: see :func:`convert_ws_conv`."""
        super().__init__(*args, **kwargs)
        for m in convert_ws_conv(self, kernels).modules():
            if isinstance(m, WSConv2d):
                m.channels_last = kernels != "reference"

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        kernels = check_keys(cfg, cls.section)
        return {**super().from_config(cfg, input_shape), "kernels": kernels}  # type: ignore[misc]


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCGNWSHead(_GNWSHead, FastRCNNConvFCHead):
    """:class:`FastRCNNConvFCHead` with its convolutions weight-standardized."""

    section = "ROI_BOX_HEAD"


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleGNWSHead(_GNWSHead, MaskRCNNConvUpsampleHead):
    """:class:`MaskRCNNConvUpsampleHead` with its convolutions alone weight-standardized."""

    section = "ROI_MASK_HEAD"

    @configurable
    def __init__(self, *args, scratch_init: bool = False, **kwargs):
        """
        As in the head of Detectron2, whose predictor starts with a deviation of 0.001.
        `scratch_init`: whether it starts as MMDetection's, see ``MODEL.GNWS.SCRATCH_INIT``.
        """
        super().__init__(*args, **kwargs)
        if scratch_init:
            weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        return {**ret, "scratch_init": starts_from_scratch(cfg)}
