from .catalog import checkpoint_urls
from .checkpointer import GNWSCheckpointer, load_checkpoint, save_checkpoint
from .convert import convert_to_detectron2, convert_to_mmdet

__all__ = [
    "GNWSCheckpointer",
    "checkpoint_urls",
    "convert_to_detectron2",
    "convert_to_mmdet",
    "load_checkpoint",
    "save_checkpoint",
]
