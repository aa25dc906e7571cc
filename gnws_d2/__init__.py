"""Group Normalization + Weight Standardization (GN+WS) detectors for Detectron2."""

from typing import TYPE_CHECKING, Any

# These imports fill Detectron2's registries and catalogs.
from . import checkpoint, data, model_zoo, modeling
from .prediction import Predictor, sample_image, to_supervision

if TYPE_CHECKING:
    from .finetuning import finetune

__all__ = [
    "Predictor",
    "checkpoint",
    "data",
    "finetune",
    "model_zoo",
    "modeling",
    "sample_image",
    "to_supervision",
]


def __getattr__(name: str) -> Any:
    if name == "finetune":  # with the engine, which a predictor does not need
        from .finetuning import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
