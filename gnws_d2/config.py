"""The config keys of this project, beside Detectron2's own."""

from detectron2.config import CfgNode


def add_gnws_config(cfg: CfgNode) -> None:
    """Add the keys below to `cfg`. The models also build from configs without them."""
    cfg.MODEL.GNWS = CfgNode()
    # "auto": the fastest implementation for the device that the weights are on, all exact to
    # "reference": PyTorch's own operators one by one, weights standardized on every forward.
    cfg.MODEL.GNWS.KERNELS = "auto"
