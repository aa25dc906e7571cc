from .picture import sample_image
from .predictor import Predictor, find_trained
from .results import to_supervision
