from .model_zoo import get, get_checkpoint_url, get_config, get_config_file, names, table

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "names", "table"]
