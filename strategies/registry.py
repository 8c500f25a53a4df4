"""Strategy names to classes. A new strategy is one new file and one line here."""

from collections.abc import Mapping
from typing import Any, TypeVar

from ..precision.names import add_class, resolve
from .base import Strategy

Kind = TypeVar("Kind", bound=type[Strategy])

# name -> "file:Class"; the class receives the name's own options.
STRATEGIES: dict[str, tuple[str | type, Mapping[str, Any]]] = {
    "single": ("single:Single", {}),
    "auto": ("auto:Auto", {}),
    "ddp": ("ddp.strategy:DDP", {}),
    "fsdp1": ("fsdp1.strategy:FSDP1", {}),
    "fsdp2": ("fsdp2.strategy:FSDP2", {}),
    "tp": ("tensor_parallel:TensorParallel", {}),
    "dp": ("dp:DP", {}),
    "deepspeed": ("deepspeed.strategy:DeepSpeed", {}),
    **{f"deepspeed_stage_{stage}": ("deepspeed.strategy:DeepSpeed", {"stage": stage}) for stage in range(4)},
    "xla": ("xla.strategy:XLASPMD", {}),
}
ALIASES: Mapping[str, str] = {"fsdp": "fsdp2"}


def register_strategy(added: Kind) -> Kind:
    """Make a strategy of your own known by its ``name``, to ``Fit``, to configuration files and to command lines.

    Args:
        added: the class. What stands above ``Fit``, or in the file that a command names, is run on every rank.

    Returns:
        The class.

    Raises:
        TypeError, ValueError: it is no Strategy, or has no name of its own.

    Example:
        Above ``class Mine(DDP)``, in which ``name = "mine"`` stands: ``@register_strategy``. Then
        ``Fit(module, data, strategy="mine")``.
    """
    add_class("strategy", added, Strategy, STRATEGIES, ALIASES)
    return added


def get_strategy(choice: "str | Strategy") -> Strategy:
    """The strategy for a name ("ddp", "fsdp2", ...) or an instance, which is returned as it is."""
    return resolve("strategy", choice, Strategy, STRATEGIES, ALIASES, __package__ or "")
