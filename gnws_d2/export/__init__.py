from .detections import compare_detections, detect
from .fold import fold_model

__all__ = ["compare_detections", "detect", "fold_model"]
