from .checks import check_setup
from .defaults import Trainer, default_setup, get_config, load_config
from .launch import launch

__all__ = [
    "Trainer",
    "check_setup",
    "default_setup",
    "get_config",
    "launch",
    "load_config",
]
