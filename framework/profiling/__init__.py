"""Profilers, which say where a run's time goes: ``Fit(profiler=...)`` takes a name or an instance."""

from collections.abc import Mapping
from typing import Any

from ...precision.names import resolve
from ...strategies.base import Strategy
from .options import Profiler, SimpleProfiler, TorchProfiler

# name -> "file:Class"; the class receives the name's own options.
PROFILERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "simple": ("options:SimpleProfiler", {}),
    "torch": ("options:TorchProfiler", {}),
}


def get_profiler(choice: "str | Profiler", strategy: Strategy) -> Profiler:
    """Return the profiler for a name or an instance.

    Raises:
        TypeError: it is neither.
        ValueError: no profiler goes by that name, or it doesn't see what runs under the strategy.
    """
    found = resolve("profiler", choice, Profiler, PROFILERS, {}, __name__)
    if strategy.unprofiled:
        raise ValueError(f"profiler={choice!r} under strategy={strategy.name!r}: {strategy.unprofiled}.")
    return found


__all__ = ["PROFILERS", "Profiler", "SimpleProfiler", "TorchProfiler", "get_profiler"]
