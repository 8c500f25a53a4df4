"""Number formats: ``Fit(precision=...)`` takes a name, or an instance of a class here."""

from .apex import ApexO1, ApexO2
from .base import Precision
from .double import Double
from .fp8 import FP8
from .full import Full
from .half import BF16True, FP16True
from .mixed import BF16Mixed, FP16Mixed, Mixed
from .mxfp8 import MXFP8
from .registry import PRECISIONS, get_precision
from .transformer_engine import TransformerEngine

__all__ = [
    "FP8",
    "MXFP8",
    "PRECISIONS",
    "ApexO1",
    "ApexO2",
    "BF16Mixed",
    "BF16True",
    "Double",
    "FP16Mixed",
    "FP16True",
    "Full",
    "Mixed",
    "Precision",
    "TransformerEngine",
    "get_precision",
]
