"""A GN+WS model as a plain GN one, of Detectron2's own modules."""

import copy

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..layers import fold_ws_conv

# Our registered names, and Detectron2's for the same without weight standardization.
STOCK_NAMES = {
    "build_resnet_gnws_backbone": "build_resnet_backbone",
    "build_resnet_gnws_fpn_backbone": "build_resnet_fpn_backbone",
    "FastRCNNConvFCGNWSHead": "FastRCNNConvFCHead",
    "MaskRCNNConvUpsampleGNWSHead": "MaskRCNNConvUpsampleHead",
}


def fold_model(model: nn.Module, cfg: CfgNode) -> tuple[nn.Module, CfgNode]:
    """
    Put the standardized weights in place of the trained ones.

    Args:
        model: a GN+WS model, which stays as it is.
        cfg: its config.

    Returns:
        A model of Detectron2's own modules, in evaluation mode, that gives the same predictions,
        and its config, which stock Detectron2 reads without this project.
    """
    cfg = cfg.clone()
    cfg.defrost()
    _remove_own_keys(cfg, get_cfg())
    for node in (cfg.MODEL.BACKBONE, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        node.NAME = STOCK_NAMES.get(node.NAME, node.NAME)
    folded = build_model(cfg)
    folded.load_state_dict(fold_ws_conv(copy.deepcopy(model)).state_dict())
    return folded.eval(), cfg


def _remove_own_keys(cfg: CfgNode, stock: CfgNode) -> None:
    """Leave those that Detectron2 knows."""
    for key, value in list(cfg.items()):
        if key not in stock:
            del cfg[key]
        elif isinstance(value, CfgNode):
            _remove_own_keys(value, stock[key])
