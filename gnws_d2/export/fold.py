"""Fold weight standardization: turn a GN+WS model into a plain GN model."""

import copy

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..layers import fold_for_inference

# Registered names of this project, and Detectron2's without weight standardization. Their proposal
# generators differ in training alone.
STOCK_NAMES = {
    "build_resnet_gnws_backbone": "build_resnet_backbone",
    "build_resnet_gnws_fpn_backbone": "build_resnet_fpn_backbone",
    "FastRCNNConvFCGNWSHead": "FastRCNNConvFCHead",
    "MaskRCNNConvUpsampleGNWSHead": "MaskRCNNConvUpsampleHead",
    "MinQualityRPN": "RPN",
}


def fold_model(model: nn.Module, cfg: CfgNode) -> tuple[nn.Module, CfgNode]:
    """
    Return a model of Detectron2's own modules with the standardized weights of a GN+WS model, which
    is not modified, in evaluation mode, and its config for stock Detectron2.
    """
    stock = cfg.clone()
    stock.defrost()
    _remove_other_keys(stock, get_cfg())
    for name in ("BACKBONE", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "PROPOSAL_GENERATOR"):
        node = stock.MODEL[name]
        node.NAME = STOCK_NAMES.get(node.NAME, node.NAME)
    folded = build_model(stock)
    folded.load_state_dict(fold_for_inference(copy.deepcopy(model)).state_dict())
    return folded.eval(), stock


def _remove_other_keys(cfg: CfgNode, known: CfgNode) -> None:
    for key in list(cfg):
        if key not in known:
            del cfg[key]
        elif isinstance(cfg[key], CfgNode):
            _remove_other_keys(cfg[key], known[key])
