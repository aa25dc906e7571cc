from .model_zoo import (
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    imagenet_backbones,
    names,
    table,
)

__all__ = [
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "imagenet_backbones",
    "names",
    "table",
]
