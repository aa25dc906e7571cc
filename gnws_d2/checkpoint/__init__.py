from .catalog import checkpoint_urls
from .checkpointer import GNWSCheckpointer
from .convert import convert_to_detectron2, convert_to_mmdet
from .files import find_checkpoint, load_checkpoint, read_config, save_checkpoint
