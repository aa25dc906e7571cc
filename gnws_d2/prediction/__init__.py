from .picture import sample_image
from .predictor import Predictor, find_trained
from .results import to_supervision

__all__ = ["Predictor", "find_trained", "sample_image", "to_supervision"]
