from .predictor import Predictor, find_trained

__all__ = ["Predictor", "find_trained"]
