from detectron2.config import CfgNode

from ..config import check_choice
from ..utils.errors import UserError


def check_group_norm(key: str, norm: str) -> None:
    """
    Raises:
        UserError: if `norm`, the value of the config key `key`, is not "GN". Detectron2's
            defaults (frozen BatchNorm, or none) would build a network without GroupNorm.
    """
    if norm != "GN":
        raise UserError(f'{key} is "{norm}", but a GN+WS model needs GroupNorm: set {key} GN.')


def get_kernels(cfg: CfgNode) -> str:
    """
    Returns:
        ``MODEL.GNWS.KERNELS``; "auto" for a config of Detectron2's ``get_cfg()`` alone.

    Raises:
        UserError: if it is neither "auto" nor "reference".
    """
    kernels = cfg.MODEL.GNWS.KERNELS if "GNWS" in cfg.MODEL else "auto"
    check_choice("MODEL.GNWS.KERNELS", kernels, ("auto", "reference"))
    return kernels
