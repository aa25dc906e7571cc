from .checks import check_setup
from .defaults import Trainer, get_config, load_config
from .launch import launch

__all__ = [
    "Trainer",
    "check_setup",
    "get_config",
    "launch",
    "load_config",
]
