from .report import make_report
