from .report import make_report

__all__ = ["make_report"]
