from .backbone import (
    build_resnet_gnws_backbone,
    build_resnet_gnws_fpn_backbone,
    checkpoint_activations,
)
from .roi_heads import FastRCNNConvFCGNWSHead, MaskRCNNConvUpsampleGNWSHead
from .rpn import MinQualityMatcher, MinQualityRPN
