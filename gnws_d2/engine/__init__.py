from .checks import check_setup
from .defaults import (
    Trainer,
    add_dataset_argument,
    argument_parser,
    default_setup,
    get_config,
    load_config,
)
from .launch import launch

__all__ = [
    "Trainer",
    "add_dataset_argument",
    "argument_parser",
    "check_setup",
    "default_setup",
    "get_config",
    "launch",
    "load_config",
]
