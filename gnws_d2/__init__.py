"""Group Normalization + Weight Standardization (GN+WS) detectors for Detectron2."""

from . import data, modeling  # noqa: F401  (importing them fills Detectron2's registries)
