from .catalog import checkpoint_urls
from .checkpointer import GNWSCheckpointer, load_checkpoint, read_config, save_checkpoint
from .convert import convert_to_detectron2, convert_to_mmdet
from .run import find_run_checkpoint

__all__ = [
    "GNWSCheckpointer",
    "checkpoint_urls",
    "convert_to_detectron2",
    "convert_to_mmdet",
    "find_run_checkpoint",
    "load_checkpoint",
    "read_config",
    "save_checkpoint",
]
