from .export import compare_detections, export_model
from .fold import fold_model
from .formats import detect
