"""Predictions on the disk: written while they are made, in bounded memory, and read again in the order of the data."""

from .options import PredictionWriter
from .reading import iterate_predictions, read_predictions

__all__ = ["PredictionWriter", "iterate_predictions", "read_predictions"]
