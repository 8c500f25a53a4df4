"""The precisions' names, and the class of each, whose file is imported when the name is asked for."""

from collections.abc import Mapping
from typing import Any, TypeVar

from .base import Precision
from .names import add_class, class_at, resolve

Kind = TypeVar("Kind", bound=type[Precision])

# name -> "file:Class"; the class receives the name's own options.
PRECISIONS: dict[str, tuple[str | type, Mapping[str, Any]]] = {
    "32-true": ("full:Full", {}),
    "64-true": ("double:Double", {}),
    "bf16-mixed": ("mixed:BF16Mixed", {}),
    "bf16-true": ("half:BF16True", {}),
    "16-mixed": ("mixed:FP16Mixed", {}),
    "16-true": ("half:FP16True", {}),
    "fp8": ("fp8:FP8", {}),
    "mxfp8": ("mxfp8:MXFP8", {}),
    "fp8-te": ("transformer_engine:TransformerEngine", {}),
    "apex-O1": ("apex:ApexO1", {}),
    "apex-O2": ("apex:ApexO2", {}),
}
ALIASES: Mapping[str, str] = {
    "fp32": "32-true",
    "32": "32-true",
    "fp64": "64-true",
    "64": "64-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
    "16": "16-mixed",
}


def class_of(name: str) -> type[Precision]:
    """Import the class of a name in PRECISIONS. It can be asked where none can be made for want of a GPU or package."""
    found: type[Precision] = class_at(PRECISIONS[name][0], __package__ or "")
    return found


def register_precision(added: Kind) -> Kind:
    """Make a precision of your own known by its ``name``, to ``Fit``, to configuration files and to command lines.

    Args:
        added: the class. What stands above ``Fit``, or in the file that a command names, is run on every rank.

    Returns:
        The class.

    Raises:
        TypeError, ValueError: it is no Precision, or has no name of its own.

    Example:
        Above ``class Rounded(BF16Mixed)``, in which ``name = "rounded"`` stands: ``@register_precision``. Then
        ``Fit(module, data, precision="rounded")``.
    """
    add_class("precision", added, Precision, PRECISIONS, ALIASES)
    return added


def get_precision(choice: "str | Precision") -> Precision:
    """The precision for a name ("bf16-mixed", "fp16", ...) or an instance, which is returned as it is."""
    return resolve("precision", choice, Precision, PRECISIONS, ALIASES, __package__ or "")
