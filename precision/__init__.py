"""Number formats: ``Fit(precision=...)`` takes a name, or an instance of a class here."""

from .base import Precision
from .fp8 import FP8
from .full import Full
from .mixed import BF16Mixed, FP16Mixed, Mixed
from .registry import PRECISIONS, get_precision

__all__ = ["FP8", "PRECISIONS", "BF16Mixed", "FP16Mixed", "Full", "Mixed", "Precision", "get_precision"]
