"""Loggers, which write down the numbers of a run: ``Fit(loggers=[...])`` takes names or instances."""

from collections.abc import Iterable, Mapping
from typing import Any

from ...precision.names import resolve
from .base import LoggedRun, Logger
from .together import Loggers, LoggerWarning

# name -> "file:Class"; the class receives the name's own options.
LOGGERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "jsonl": ("json_lines:JsonLinesLogger", {}),
    "tensorboard": ("tensorboard:TensorBoardLogger", {}),
}


def get_loggers(choices: Iterable["str | Logger"]) -> list[Logger]:
    """Return loggers for names and instances.

    Raises:
        TypeError: it isn't a list, or holds something else.
        ValueError: no logger goes by that name.
    """
    if isinstance(choices, str | Logger):
        raise TypeError(f"loggers takes a list, e.g. loggers=[{choices!r}]. Received: {choices!r}")
    return [resolve("logger", choice, Logger, LOGGERS, {}, __name__) for choice in choices]


__all__ = ["LOGGERS", "LoggedRun", "Logger", "LoggerWarning", "Loggers", "get_loggers"]
