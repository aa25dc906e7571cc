"""Group Normalization + Weight Standardization (GN+WS) detectors for Detectron2."""

# Importing them fills Detectron2's registries and catalogs.
from . import checkpoint, data, modeling  # noqa: F401
from .engine.predictor import Predictor

__all__ = ["Predictor"]
