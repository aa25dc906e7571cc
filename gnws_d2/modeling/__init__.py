from .backbone import build_resnet_gnws_backbone, build_resnet_gnws_fpn_backbone
from .build import build_model
from .roi_heads import FastRCNNConvFCGNWSHead, MaskRCNNConvUpsampleGNWSHead

__all__ = [
    "FastRCNNConvFCGNWSHead",
    "MaskRCNNConvUpsampleGNWSHead",
    "build_model",
    "build_resnet_gnws_backbone",
    "build_resnet_gnws_fpn_backbone",
]
