"""The loggers of a Fit together: opened when they are first needed, told, flushed and closed, whatever one raises."""

import atexit
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from ..printing import say
from .base import LoggedFit, LoggedRun, Logger
from .channel import BackgroundChannel, Channel
from .values import as_histogram, as_image

# Seconds that the end of a training waits for loggers that are behind; fewer where it is broken off, as the process may
# be about to be killed; and those that the end of the Fit waits.
AFTER_TRAINING = 10.0
IN_HURRY = 3.0
AT_THE_END = 30.0


class LoggerWarning(UserWarning):
    """A logger failed, or is too slow. Training goes on; numbers may be missing where it writes."""


class Loggers:
    """The loggers of a Fit (``fit.loggers``), which live as long as it does.

    They are opened at the first ``train``, ``evaluate`` or ``predict``, and stay open for all that follow. Where a
    later run has another ``output_dir``, as each trial of a search has, they are closed and opened for that one. Each
    is called from a thread of its own, but for those that want to be called at once (``Logger.synchronous``). An
    exception of a logger becomes a LoggerWarning, once, and the logger is told the next numbers all the same.

    ``image``, ``text``, ``histogram`` and ``table`` are for callbacks, and for modules that are given this object
    (``module.shown = fit.loggers``). They do nothing on other ranks than the main one.

    Args:
        loggers: of the main process; other processes have none.
        fit: whose loggers they are. It isn't kept from ending.
        record: what keeps the run's record, which is told everything first, and isn't one of those that were given.

    Example:
        >>> class Samples(Callback):
        ...     def on_evaluate(self, args, state, control, *, fit, **context):
        ...         fit.loggers.image("sample", fit.module.draw())
    """

    def __init__(self, loggers: Iterable[Logger], fit: LoggedFit, record: Logger | None = None) -> None:
        self._given = list(loggers)
        self._channels = self._make_channels([*([record] if record is not None else []), *self._given])
        self._fit = weakref.ref(fit)
        self._output_dir: str | None = None  # which the loggers were opened for; None while they are closed
        self._process = os.getpid()
        self._is_hurried = False
        self._said: set[str] = set()
        self._noted: deque[tuple[str, Path, str]] = deque()  # what became of checkpoints, and is still to be told

    def __deepcopy__(self, memo: dict[int, Any]) -> "Loggers":
        return self  # of a module that was given it

    @property
    def all(self) -> list[Logger]:
        """The loggers, in their order; none on other ranks than the main one."""
        return list(self._given)

    def begin(self) -> None:
        """Tell the loggers that training begins, or is resumed."""
        self._is_hurried = False
        if (fit := self._open()) is not None:
            self._hand("begin", LoggedRun.of(fit))

    def log(self, logs: dict[str, float], step: int) -> None:
        """Hand the numbers of an update to every logger."""
        if self._open() is not None:
            if self._noted:
                self.tell_of_checkpoints()
            self._hand("log", logs, step)

    def event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Tell the loggers that are open what happened at an update; see ``Logger.event``."""
        self.tell_of_checkpoints()
        self._tell(event, step, details)

    def note_checkpoint(self, event: str, path: Path) -> None:
        """Note, from any thread, that a checkpoint was saved or removed, for ``tell_of_checkpoints``."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._noted.append((event, path, now))

    def tell_of_checkpoints(self) -> None:
        """Tell the loggers of the checkpoints that were saved or removed since they were told last."""
        while self._noted:
            event, path, when = self._noted.popleft()
            self._tell(event, int(path.name.rpartition("-")[2]), {"checkpoint": path.name, "time": when})

    def image(self, name: str, image: Any, step: int | None = None) -> None:
        """Show an image.

        Args:
            name: of the series of images.
            image: a tensor or array of the shape (height, width), (height, width, channels) or (channels, height,
                width), with 1, 3 or 4 channels; bytes, or floating point from 0 to 1. It is copied to the host.
            step: the update that it belongs to; None means the current one.

        Raises:
            ValueError: it has another shape.
        """
        if self._are_there("image"):
            array = as_image(name, image)
            self._show("image", step, name, array, size=array.nbytes)

    def text(self, name: str, text: str, step: int | None = None) -> None:
        """Show a text in Markdown. Arguments as of ``image``."""
        if self._are_there("text"):
            self._show("text", step, name, str(text), size=len(text))

    def histogram(self, name: str, values: Any, step: int | None = None) -> None:
        """Show how values are spread: a tensor or array of any shape, or the counts and edges of ``numpy.histogram``.
        Other arguments as of ``image``.
        """
        if self._are_there("histogram"):
            self._show("histogram", step, name, as_histogram(name, values), size=1024)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int | None = None) -> None:
        """Show a table of text and numbers. Other arguments as of ``image``.

        Raises:
            ValueError: a row has more or fewer cells than there are columns.
        """
        if self._are_there("table"):
            head, lines = [str(column) for column in columns], [list(row) for row in rows]
            if wrong := [len(line) for line in lines if len(line) != len(head)]:
                raise ValueError(f"The table {name!r} has {len(head)} columns, and a row of {wrong[0]} cells.")
            self._show("table", step, name, head, lines, size=100 * len(head) * len(lines))

    def flush(self, in_hurry: bool = False) -> None:
        """Have every logger make readable what was logged, and wait for it, but not for long.

        Args:
            in_hurry: the run was broken off.
        """
        self._is_hurried = in_hurry
        if self._output_dir is not None and self._process == os.getpid():
            self.tell_of_checkpoints()
            self._hand("flush")
            self._wait(IN_HURRY if in_hurry else AFTER_TRAINING, "It goes on in the background.")

    def close(self, waits: bool = True) -> None:
        """Close the loggers that are open. A later log opens them again.

        Args:
            waits: until they are closed, but not for long.
        """
        if self._output_dir is None or self._process != os.getpid():
            return
        self.tell_of_checkpoints()
        self._output_dir = None
        self._hand("close")
        if waits:
            self._wait(
                IN_HURRY if self._is_hurried else AT_THE_END, "If the process ends now, they are lost there.", True
            )

    def _make_channels(self, loggers: Iterable[Logger]) -> list[Channel]:
        # What a package does at the end of the process, it has asked for by then: this is done before.
        when_open = partial(atexit.register, close_if_there, weakref.ref(self))
        return [(Channel if each.synchronous else BackgroundChannel)(each, when_open) for each in loggers]

    def _open(self) -> LoggedFit | None:
        """Open the loggers, unless they are open for the ``output_dir`` of the Fit, which is returned."""
        fit = self._fit()
        if fit is None or not self._channels:
            return None
        if self._process != os.getpid():  # a fork has neither the threads nor what the loggers have opened
            self._channels = self._make_channels([channel.logger for channel in self._channels])
            self._process, self._output_dir = os.getpid(), None
        if fit.args.output_dir != self._output_dir:
            self.close(waits=False)
            self._output_dir = fit.args.output_dir
            self._hand("open", LoggedRun.of(fit))
        return fit

    def _tell(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        if self._output_dir is None or self._process != os.getpid():
            return
        for channel in self._channels:
            if is_able(channel.logger, "event"):
                channel.hand("event", event, step, details)
        self._warn()

    def _hand(self, method: str, *arguments: Any) -> None:
        for channel in self._channels:
            channel.hand(method, *arguments)
        self._warn()

    def _are_there(self, verb: str) -> bool:
        """Whether a logger knows a verb. Those that don't are named, once."""
        unable = [type(logger).__name__ for logger in self._given if not is_able(logger, verb)]
        if unable and verb not in self._said:
            self._said.add(verb)
            say(f"fit.loggers.{verb}: left out by {', '.join(unable)}, which can't show it.")
        return len(unable) < len(self._given)

    def _show(self, verb: str, step: int | None, *arguments: Any, size: int) -> None:
        if (fit := self._open()) is None:
            return
        for channel in self._channels:
            if is_able(channel.logger, verb):
                channel.hand(verb, *arguments, fit.state.global_step if step is None else step, size=size)
        self._warn()

    def _wait(self, seconds: float, otherwise: str, is_last: bool = False) -> None:
        """Wait for all loggers together, and say what is missing then."""
        until = time.monotonic() + seconds
        for channel in self._channels:
            if left := channel.unfinished(max(0.0, until - time.monotonic()), is_last):
                channel.notes.append(f"is behind: {left} of its calls weren't made within {seconds:g} s. {otherwise}")
        self._warn()

    def _warn(self) -> None:
        for channel in self._channels:
            while channel.notes:
                warn(channel.logger, channel.notes.popleft())


def close_if_there(loggers: "weakref.ref[Loggers]") -> None:
    """Close the loggers of a Fit that is still there."""
    if (found := loggers()) is not None:
        found.close()


def is_able(logger: Logger, verb: str) -> bool:
    """Whether a logger defines a verb of its own."""
    return getattr(type(logger), verb) is not getattr(Logger, verb)


def warn(logger: Logger, what: str) -> None:
    """Warn of a logger that failed, or is slow."""
    warnings.warn(f"The logger {type(logger).__name__} {what}", LoggerWarning, stacklevel=5)
