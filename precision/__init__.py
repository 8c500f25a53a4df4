"""Number formats: ``Fit(precision=...)`` takes a name, or an instance of a class here.

Each class is imported from its file when it is first asked for, so that a name costs no import of the others.
"""

from typing import TYPE_CHECKING

from .base import Precision
from .names import files_of, lazy_exports
from .registry import PRECISIONS, get_precision, register_precision

if TYPE_CHECKING:
    from .apex import ApexO1, ApexO2
    from .double import Double
    from .fp8 import FP8
    from .full import Full
    from .half import BF16True, FP16True, LostUpdates
    from .mixed import BF16Mixed, FP16Mixed, Mixed
    from .mxfp8 import MXFP8
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
    "LostUpdates",
    "Mixed",
    "Precision",
    "TransformerEngine",
    "get_precision",
    "register_precision",
]

FILES = {**files_of(PRECISIONS), "LostUpdates": "half", "Mixed": "mixed"}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
