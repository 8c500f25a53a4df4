"""The number formats that a benchmark is asked for: those of the registry by name, and emulated ones on request."""

from collections.abc import Callable, Iterable
from typing import Any

from stratagem.precision import FP8, MXFP8

EMULATED: dict[str, Callable[[], Any]] = {
    "fp8": lambda: FP8(emulate=True),
    "mxfp8": lambda: MXFP8(emulate=True),
}


def formats(names: Iterable[str], emulate: bool) -> dict[str, Callable[[], Any]]:
    """Label to what makes the format that Fit is given, which may raise where this machine can't compute in it.

    Args:
        names: of the registry.
        emulate: also "fp8 emulated", ..., whose rounding is the real one's and whose speed says nothing about it.
    """
    made: dict[str, Callable[[], Any]] = {}
    for name in names:
        made[name] = lambda name=name: name  # type: ignore[misc]
        if emulate and name in EMULATED:
            made[f"{name} emulated"] = EMULATED[name]
    return made
