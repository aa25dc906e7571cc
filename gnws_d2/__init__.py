"""Group Normalization + Weight Standardization (GN+WS) detectors for Detectron2."""

# These imports fill Detectron2's registries and catalogs.
from . import checkpoint, data, model_zoo, modeling
from .engine.predictor import Predictor

__all__ = ["Predictor", "checkpoint", "data", "model_zoo", "modeling"]
