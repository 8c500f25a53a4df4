"""The loggers of a Fit together: opened when they are first needed, told, flushed and closed, whatever one raises."""

import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .base import LoggedRun, Logger

# Seconds before a logger that couldn't be opened is tried again, at the next log: W&B may take long to give up.
RETRY_AFTER = 60.0


class LoggerWarning(UserWarning):
    """A logger failed. Training goes on; numbers may be missing where it writes."""


class Loggers:
    """The loggers of a Fit, which live as long as it does.

    They are opened at the first ``train``, ``evaluate`` or ``predict``, and stay open for all that follow. Where a
    later run has another ``output_dir``, as each trial of a search has, they are closed and opened for that one. An
    exception of a logger becomes a LoggerWarning, once, and the logger is told the next numbers all the same.

    Args:
        loggers: of the main process; other processes have none.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.all = list(loggers)
        self.output_dir: str | None = None  # which the loggers were opened for; None while they are closed
        self.opened: list[Logger] = []
        self.tried = 0.0  # when loggers were last opened
        self.noted: deque[tuple[str, Path, str]] = deque()  # what became of checkpoints, and is still to be told
        self.failures: dict[int, int] = {}  # the number of calls that raised, by the place of the logger

    def open(self, fit: LoggedRun) -> None:
        """Open the loggers that aren't open for the ``output_dir`` of the run."""
        if fit.args.output_dir != self.output_dir:
            self.close()
            self.output_dir = fit.args.output_dir
        elif len(self.opened) == len(self.all) or time.monotonic() - self.tried < RETRY_AFTER:
            return
        self.tried = time.monotonic()
        for logger in self.all:
            if logger not in self.opened and self.call(logger, "open", fit):
                self.opened.append(logger)

    def begin(self, fit: LoggedRun) -> None:
        """Tell the loggers that training begins, or is resumed."""
        self.open(fit)
        for logger in self.opened:
            self.call(logger, "begin", fit)

    def log(self, fit: LoggedRun, logs: dict[str, float], step: int) -> None:
        """Hand the numbers of an update to every logger."""
        self.open(fit)
        if self.noted:
            self.tell_of_checkpoints()
        for logger in self.opened:
            self.call(logger, "log", logs, step)

    def event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Tell every open logger what happened at an update; see ``Logger.event``."""
        self.tell_of_checkpoints()
        for logger in self.opened:
            self.call(logger, "event", event, step, details)

    def note_checkpoint(self, event: str, path: Path) -> None:
        """Note, from any thread, that a checkpoint was saved or removed, for ``tell_of_checkpoints``."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.noted.append((event, path, now))

    def tell_of_checkpoints(self) -> None:
        """Tell the loggers of the checkpoints that were saved or removed since they were told last."""
        while self.noted:
            event, path, when = self.noted.popleft()
            for logger in self.opened:
                details = {"checkpoint": path.name, "time": when}
                self.call(logger, "event", event, int(path.name.rpartition("-")[2]), details)

    def flush(self) -> None:
        """Have every logger make readable what was logged."""
        self.tell_of_checkpoints()
        for logger in self.opened:
            self.call(logger, "flush")

    def close(self) -> None:
        """Close the loggers that are open. A later log opens them again."""
        opened, self.opened, self.output_dir = self.opened, [], None
        for logger in opened:
            self.call(logger, "close")
        for place, failed in self.failures.items():
            if failed > 1:
                warn(self.all[place], f"failed {failed} times: numbers may be missing where it writes.")
        self.failures = {}

    def call(self, logger: Logger, method: str, *arguments: Any) -> bool:
        """Call a method of a logger, and return whether it succeeded."""
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
    """Warn of a logger that failed."""
    warnings.warn(f"The logger {type(logger).__name__} {what}", LoggerWarning, stacklevel=4)
