from .checks import check_setup
from .defaults import Trainer, default_setup, get_config
from .launch import join_torchrun, lock_output_dir, supervise

__all__ = [
    "Trainer",
    "check_setup",
    "default_setup",
    "get_config",
    "join_torchrun",
    "lock_output_dir",
    "supervise",
]
