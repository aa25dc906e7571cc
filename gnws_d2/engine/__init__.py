from .checks import check_setup
from .defaults import Trainer, argument_parser, get_config, load_config

__all__ = ["Trainer", "argument_parser", "check_setup", "get_config", "load_config"]
