from .api import FORMATS, Exported, export_model, format_table
from .fold import fold_model

__all__ = ["FORMATS", "Exported", "export_model", "fold_model", "format_table"]
