"""Folding of weight standardization: a GN+WS model as a plain GN one."""

import copy
from itertools import chain

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..config import flatten_config
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
    Return a model of Detectron2's own modules that has the standardized weights of a GN+WS model,
    in evaluation mode, and its config for stock Detectron2.

    Args:
        model, cfg: the GN+WS model, which is left unchanged, and its config.
    """
    stock = get_cfg()
    known = flatten_config(stock)
    own = [item for item in flatten_config(cfg.clone()).items() if item[0] in known]
    # A string is parsed as Python; inf would have no notation there.
    stock.merge_from_list(list(chain(*((k, repr(v) if isinstance(v, str) else v) for k, v in own))))
    for node in (stock.MODEL.BACKBONE, stock.MODEL.ROI_BOX_HEAD, stock.MODEL.ROI_MASK_HEAD):
        node.NAME = STOCK_NAMES.get(node.NAME, node.NAME)
    folded = build_model(stock)
    folded.load_state_dict(fold_ws_conv(copy.deepcopy(model)).state_dict())
    return folded.eval(), stock
