"""A trained GN+WS model as a plain GN one, for stock Detectron2."""

import os

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from ..layers import fold_ws_conv
from .checkpointer import GNWSCheckpointer, save_checkpoint

# Our registered names, and Detectron2's for the same without weight standardization.
STOCK_NAMES = {
    "build_resnet_gnws_backbone": "build_resnet_backbone",
    "build_resnet_gnws_fpn_backbone": "build_resnet_fpn_backbone",
    "FastRCNNConvFCGNWSHead": "FastRCNNConvFCHead",
    "MaskRCNNConvUpsampleGNWSHead": "MaskRCNNConvUpsampleHead",
}


def fold_model(cfg: CfgNode, output_dir: str) -> tuple[str, str]:
    """
    Write a checkpoint with the standardized weights in place of the trained ones, and a config of
    Detectron2's own modules that names it. Stock Detectron2 loads them without this project, and
    gives the same predictions.

    Args:
        cfg: of a GN+WS model, with its ``MODEL.WEIGHTS``.
        output_dir: where ``config.yaml`` and ``model.pth`` are written.

    Returns:
        The paths of the config and of the checkpoint.

    Raises:
        UserError: if ``MODEL.WEIGHTS`` does not fit the model.
    """
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    model = build_model(on_cpu)
    GNWSCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS)
    os.makedirs(output_dir, exist_ok=True)
    weights = os.path.abspath(os.path.join(output_dir, "model.pth"))
    config_file = os.path.join(output_dir, "config.yaml")
    state = fold_ws_conv(model).state_dict()
    save_checkpoint({"model": state, "weight_standardization": False}, weights)

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    _remove_own_keys(cfg, get_cfg())
    for node in (cfg.MODEL.BACKBONE, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        node.NAME = STOCK_NAMES.get(node.NAME, node.NAME)
    with open(config_file, "w") as f:
        f.write(cfg.dump())
    return config_file, weights


def _remove_own_keys(cfg: CfgNode, stock: CfgNode) -> None:
    """Leave those that Detectron2 knows."""
    for key, value in list(cfg.items()):
        if key not in stock:
            del cfg[key]
        elif isinstance(value, CfgNode):
            _remove_own_keys(value, stock[key])
