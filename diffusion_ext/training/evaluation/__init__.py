"""Quality of samples: recognition, features, and nearness to the training images."""

from .evaluate import Evaluation, evaluate
from .features import Judge, RealImages, train_judge
from .measures import Nearest, frechet_distance, nearest, precision_recall

__all__ = [
    "Evaluation",
    "Judge",
    "Nearest",
    "RealImages",
    "evaluate",
    "frechet_distance",
    "nearest",
    "precision_recall",
    "train_judge",
]
