from ..utils.errors import UserError


def check_group_norm(key: str, norm: str) -> None:
    """
    Raises:
        UserError: if `norm`, the value of the config key `key`, is not "GN". Detectron2's
            defaults (frozen BatchNorm, or none) would build a network without GroupNorm.
    """
    if norm != "GN":
        raise UserError(f'{key} is "{norm}", but a GN+WS model needs GroupNorm: set {key} GN.')
