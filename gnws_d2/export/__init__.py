from .export import compare_detections, export_model
from .formats import detect, fold_model
