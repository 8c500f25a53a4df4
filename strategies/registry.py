"""Strategy names to classes. A new strategy is one new file and one line here."""

from collections.abc import Mapping
from typing import Any

from ..precision.registry import resolve
from .base import Strategy

# name -> "file:Class"; the class receives the name's own options.
STRATEGIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "single": ("single:Single", {}),
}
ALIASES: Mapping[str, str] = {}


def get_strategy(choice: "str | Strategy") -> Strategy:
    """The strategy for a name ("ddp", "fsdp2", ...) or an instance, which is returned as it is."""
    return resolve("strategy", choice, Strategy, STRATEGIES, ALIASES, __package__ or "")
