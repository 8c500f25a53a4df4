"""Number formats: ``Fit(precision=...)`` takes a name, or an instance of a class here."""

from .apex import ApexO1, ApexO2
from .base import Precision
from .fp8 import FP8
from .full import Full
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
    "FP16Mixed",
    "Full",
    "Mixed",
    "Precision",
    "TransformerEngine",
    "get_precision",
]
