"""A Fit's loggers together: opened when first needed, told, flushed and closed, whatever one of them raises."""

import time
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .base import Logger

if TYPE_CHECKING:
    from ..fit import Fit

SECONDS = 60.0  # until a logger that couldn't be opened is opened again, at the next log: W&B may take long to give up


class LoggerWarning(UserWarning):
    """A logger failed. Training goes on; numbers may be missing where it writes."""


class Loggers:
    """The loggers of a Fit, which live as long as it does.

    They are opened at the first ``train``, ``evaluate`` or ``predict``, and stay open for all that follow. Where a
    later run has another ``output_dir``, as each trial of a search, they are closed and opened for that one. What one
    of them raises is a LoggerWarning, once, and it is told the next numbers all the same.

    Args:
        loggers: none on other processes than the main one.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.all = list(loggers)
        self.output_dir: str | None = None  # that they were opened for; None while they are closed
        self.opened: list[Logger] = []
        self.tried = 0.0  # when those that aren't open were last asked to
        self.failures: dict[int, int] = {}  # by a logger's place: calls that raised

    def open(self, fit: "Fit") -> None:
        """Open those that aren't open for the run's ``output_dir``."""
        if fit.args.output_dir != self.output_dir:
            self.close()
            self.output_dir = fit.args.output_dir
        elif len(self.opened) == len(self.all) or time.monotonic() - self.tried < SECONDS:
            return
        self.tried = time.monotonic()
        for logger in self.all:
            if logger not in self.opened and self.call(logger, "open", fit):
                self.opened.append(logger)

    def begin(self, fit: "Fit") -> None:
        """Training begins, or is resumed."""
        self.open(fit)
        for logger in self.opened:
            self.call(logger, "begin", fit)

    def log(self, fit: "Fit", logs: dict[str, float], step: int) -> None:
        """Hand the numbers of an update on."""
        self.open(fit)
        for logger in self.opened:
            self.call(logger, "log", logs, step)

    def flush(self) -> None:
        """Have everything that was logged readable."""
        for logger in self.opened:
            self.call(logger, "flush")

    def close(self) -> None:
        """Close those that are open. Logs that come later open them again."""
        opened, self.opened, self.output_dir = self.opened, [], None
        for logger in opened:
            self.call(logger, "close")
        for place, failed in self.failures.items():
            if failed > 1:
                warn(self.all[place], f"failed {failed} times: numbers may be missing where it writes.")
        self.failures = {}

    def call(self, logger: Logger, method: str, *arguments: Any) -> bool:
        """Call a logger's method; whether it did what it should."""
        try:
            getattr(logger, method)(*arguments)
        except Exception as error:
            place = self.all.index(logger)
            self.failures[place] = self.failures.get(place, 0) + 1
            if self.failures[place] == 1:
                warn(logger, f"raised in {method} ({type(error).__name__}: {error}). Training goes on.")
            return False
        return True


def warn(logger: Logger, what: str) -> None:
    """Say what became of a logger."""
    warnings.warn(f"The logger {type(logger).__name__} {what}", LoggerWarning, stacklevel=4)
