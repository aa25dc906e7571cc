from .checks import check_setup
from .defaults import Trainer
from .launch import join_torchrun, lock_output_dir, supervise
from .setup import default_setup, get_config

__all__ = [
    "Trainer",
    "check_setup",
    "default_setup",
    "get_config",
    "join_torchrun",
    "lock_output_dir",
    "supervise",
]
