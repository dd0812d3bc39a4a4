"""What is made of a network's predictions."""

from evaluation.predictor import Predictor

__all__ = ["Predictor"]
