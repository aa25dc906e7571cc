from .catalog import checkpoint_urls
from .checkpointer import GNWSCheckpointer, load_checkpoint, save_checkpoint
from .convert import convert_to_detectron2, convert_to_mmdet
from .fold import fold_model

__all__ = [
    "GNWSCheckpointer",
    "checkpoint_urls",
    "convert_to_detectron2",
    "convert_to_mmdet",
    "fold_model",
    "load_checkpoint",
    "save_checkpoint",
]
