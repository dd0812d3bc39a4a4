"""From network outputs to scores, pictures and files."""

from evaluation.predictor import Predictor

__all__ = ["Predictor"]
