"""Number formats: ``Fit(precision=...)`` takes a name, or an instance of a class here."""

from .base import Precision
from .double import Double
from .full import Full
from .half import BF16True, FP16True
from .mixed import BF16Mixed, FP16Mixed, Mixed
from .registry import PRECISIONS, get_precision

__all__ = [
    "PRECISIONS",
    "BF16Mixed",
    "BF16True",
    "Double",
    "FP16Mixed",
    "FP16True",
    "Full",
    "Mixed",
    "Precision",
    "get_precision",
]
