from .conversion import convert_ws_conv, fold_for_inference
from .group_norm import GroupNorm, group_norm
from .weight_standardization import WSConv2d, standardize_weight
