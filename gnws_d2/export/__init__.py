from .detections import compare_detections, detect
from .export import export_model
from .fold import fold_model

__all__ = ["compare_detections", "detect", "export_model", "fold_model"]
