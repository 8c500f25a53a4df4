"""Number formats: ``Fit(precision=...)`` takes a name, or an instance of a class here."""

from .base import Precision
from .full import Full
from .mixed import BF16Mixed, FP16Mixed, Mixed
from .registry import PRECISIONS, get_precision

__all__ = ["PRECISIONS", "BF16Mixed", "FP16Mixed", "Full", "Mixed", "Precision", "get_precision"]
