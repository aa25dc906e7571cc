from .defaults import Trainer
from .train_net import default_setup, get_config, run
