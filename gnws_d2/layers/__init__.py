from .weight_standardization import WSConv2d, convert_ws_conv, fold_ws_conv, standardize_weight

__all__ = ["WSConv2d", "convert_ws_conv", "fold_ws_conv", "standardize_weight"]
