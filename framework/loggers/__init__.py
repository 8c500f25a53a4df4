"""Loggers, which write down the numbers of a run: ``Fit(loggers=[...])`` takes names or instances."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from ...precision.names import resolve
from .base import LoggedRun, Logger
from .together import Loggers, LoggerWarning

# name -> "file:Class"; the class receives the name's own options.
LOGGERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "jsonl": ("json_lines:JsonLinesLogger", {}),
    "tensorboard": ("tensorboard:TensorBoardLogger", {}),
    "csv": ("csv:CSVLogger", {}),
    "wandb": ("wandb:WandbLogger", {}),
    "mlflow": ("mlflow:MlflowLogger", {}),
    "trackio": ("trackio:TrackioLogger", {}),
    "comet": ("comet:CometLogger", {}),
}


def get_loggers(choices: Iterable["str | Logger"]) -> list[Logger]:
    """Return loggers for names and instances.

    Raises:
        TypeError: it isn't a list, or holds something else.
        ValueError: no logger goes by that name.
        ImportError: the package of a logger isn't installed; the message says how it is.
    """
    if isinstance(choices, str | Logger):
        raise TypeError(f"loggers takes a list, e.g. loggers=[{choices!r}]. Received: {choices!r}")
    return [check_package(find_logger(choice)) for choice in choices]


def find_logger(choice: "str | Logger") -> Logger:
    """Return the logger of a name, or the instance itself."""
    try:
        return resolve("logger", choice, Logger, LOGGERS, {}, __name__)
    except ValueError as error:
        raise ValueError(f"{error} An instance of a class of your own that derives from Logger works, too.") from None


def check_package(logger: Logger) -> Logger:
    """Refuse a logger whose package isn't installed; importing it is left to where it is used."""
    if logger.package is not None:
        package, extra = logger.package
        found = find_spec(package)
        if found is None or found.origin is None:  # a directory of that name, such as W&B makes, is no package
            raise ImportError(
                f"The logger {type(logger).__name__} needs the package {package}: pip install 'stratagem[{extra}]'"
            )
    return logger


__all__ = ["LOGGERS", "LoggedRun", "Logger", "LoggerWarning", "Loggers", "get_loggers"]
