"""The way to one logger: it is opened when it can be, told everything in order, and what it raises is noted."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .base import VERBS, LoggedRun, Logger

# Seconds before a logger that couldn't be opened is tried again, at the next log: W&B may take long to give up.
RETRY_AFTER = 60.0

# Seconds that a logger is waited for that was waited for in vain before.
STILL_STUCK = 1.0

# What may wait for a logger that is slow. Beyond that, the oldest numbers are left out: the newest tell how a run went.
MOST_CALLS = 10_000
MOST_BYTES = 64 * 2**20

NUMBERS = ("log", *VERBS)
"""The calls that may be left out."""


class Channel:
    """Calls one logger, and never raises.

    Args:
        logger: it may raise.
        when_open: called, from whichever thread, when the logger is open for the first time.

    Attributes:
        notes: what the main thread is to warn of.
    """

    def __init__(self, logger: Logger, when_open: Callable[[], object]) -> None:
        self.logger, self.when_open = logger, when_open
        self.notes: deque[str] = deque()
        self.run: LoggedRun | None = None  # which the logger is, or is to be, opened for
        self.begun: LoggedRun | None = None  # the run whose training has begun
        self.is_open = self.has_been_open = False
        self.tried = 0.0
        self.failed = self.left_out = 0

    def hand(self, method: str, *arguments: Any, size: int = 0) -> None:
        """Have a method of the logger called."""
        self.call(method, *arguments)

    def unfinished(self, seconds: float, is_last: bool = False) -> int:
        """Wait for the calls that were handed over, at most so long, and return how many aren't made."""
        return 0

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of the logger, which is opened first where it isn't."""
        if method == "open":
            (self.run,) = arguments
            self.begun = None
            self._open()
            return
        if method == "begin":
            (self.begun,) = arguments
        elif method == "close":
            if self.is_open:
                self.is_open = False
                self._try("close")
            self._sum_up()
            return
        if self.is_open:
            self._try(method, *arguments)
        elif method in NUMBERS and time.monotonic() - self.tried >= RETRY_AFTER and self._open():
            if self.begun is not None:
                self._try("begin", self.begun)
            self._try(method, *arguments)

    def leave_out(self) -> None:
        """Count numbers that the logger isn't told."""
        self.left_out += 1
        if self.left_out == 1:
            self.notes.append(
                "is too slow: the oldest of the numbers that wait for it are left out there. Training goes on."
            )

    def _open(self) -> bool:
        self.tried = time.monotonic()
        self.is_open = self._try("open", self.run)
        if self.is_open and not self.has_been_open:
            self.has_been_open = True
            self.when_open()
        return self.is_open

    def _try(self, method: str, *arguments: Any) -> bool:
        try:
            getattr(self.logger, method)(*arguments)
        except (Exception, SystemExit) as error:
            self.failed += 1
            if self.failed == 1:
                self.notes.append(f"raised in {method} ({type(error).__name__}: {error}). Training goes on.")
            return False
        return True

    def _sum_up(self) -> None:
        if self.failed > 1:
            self.notes.append(f"failed {self.failed} times: numbers may be missing where it writes.")
        if self.left_out:
            self.notes.append(f"was too slow: {self.left_out} logs are missing where it writes.")
        self.failed = self.left_out = 0


class BackgroundChannel(Channel):
    """Calls one logger from a thread of its own: who hands a call over never waits for the logger.

    The thread begins with the first call, sleeps while there is none, and ends after ``close``. It doesn't keep the
    process from ending.
    """

    def __init__(self, logger: Logger, when_open: Callable[[], object]) -> None:
        super().__init__(logger, when_open)
        self._waiting: deque[tuple[str, tuple[Any, ...], int]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._bytes = 0  # of what waits
        self._made = 0  # calls
        self._is_busy = False
        self._given_up_at = -1  # how many calls were made when nobody wanted to wait longer

    def hand(self, method: str, *arguments: Any, size: int = 0) -> None:
        """Have the thread call a method of the logger.

        Args:
            method: its name.
            *arguments: nobody changes them any more.
            size: the bytes that they hold.
        """
        with self._changed:
            self._waiting.append((method, arguments, size))
            self._bytes += size
            if method in NUMBERS and (len(self._waiting) > MOST_CALLS or self._bytes > MOST_BYTES):
                self._make_room()
            if self._thread is not None:
                self._changed.notify_all()
                return
            name = f"stratagem {type(self.logger).__name__}"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError:  # Python is about to end, or the machine has no room for a thread
                self._thread = None
                calls = [self._waiting.popleft() for _ in range(len(self._waiting))]
                self._bytes = 0
        for called, given, _ in calls:
            self.call(called, *given)

    def unfinished(self, seconds: float, is_last: bool = False) -> int:
        """Wait for the calls that were handed over, at most so long, and return how many aren't made.

        Args:
            seconds: at most.
            is_last: whether nobody will wait again. Otherwise, where nothing has moved since somebody waited in vain, a
                short while tells whether something does.
        """
        until = time.monotonic() + seconds
        with self._changed:
            if (
                is_last
                or self._made != self._given_up_at
                or self._changed.wait_for(lambda: self._made != self._given_up_at, timeout=min(seconds, STILL_STUCK))
            ):
                self._changed.wait_for(
                    lambda: not self._waiting and not self._is_busy, timeout=max(0.0, until - time.monotonic())
                )
            left = len(self._waiting) + self._is_busy
            self._given_up_at = self._made if left else -1
            return left

    def _make_room(self) -> None:
        for index, (method, _, size) in enumerate(self._waiting):
            if method in NUMBERS:
                del self._waiting[index]
                self._bytes -= size
                self.leave_out()
                return

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                method, arguments, size = self._waiting.popleft()
                self._bytes -= size
                self._is_busy = True
            self.call(method, *arguments)
            del arguments  # the next call may be hours away
            with self._changed:
                self._is_busy = False
                self._made += 1
                is_over = method == "close" and not self._waiting
                if is_over:
                    self._thread = None
                self._changed.notify_all()
            if is_over:
                return
