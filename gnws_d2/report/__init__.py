from ..utils.errors import UserError

try:
    from .report import make_report
except ModuleNotFoundError as e:
    raise UserError(f"{e.name} is not installed: pip install 'gnws_d2[report]'") from e

__all__ = ["make_report"]
