"""The signals that ask a run to end, caught while it trains, and noticed in whatever call the main thread is."""

import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class Signals:
    """Catches signals from ``catch`` to ``let_go``, in the main thread of the main interpreter.

    A Python handler runs between two bytecodes of the main thread, which may wait in a collective for minutes. The
    interpreter's own handler in C, though, writes a signal's number into a socket at once, and another thread reads it
    there (``signal.set_wakeup_fd``). Handlers that the program had installed are called as before, and a socket that it
    reads signals from is given them too.

    Args:
        names: of the signals, beside SIGINT: "SIGTERM".

    Attributes:
        caught: those that are caught now.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.wanted = [signal.SIGINT, *(signal.Signals[name] for name in names)]
        self.caught: dict[int, Handler] = {}
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        self._program_fd = -1

    def catch(self) -> None:
        """Begin to catch them. What a program ignores (a job of a shell's background ignores SIGINT) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            wanted = ", ".join(wanted.name for wanted in self.wanted)
            warnings.warn(
                f"fit.train() runs in thread {threading.current_thread().name!r}, and Python lets only the main thread "
                f"catch signals: {wanted} will end this process without a checkpoint. Call fit.train() in the main "
                "thread.",
                stacklevel=4,
            )
            return
        self._program_fd = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        for number in self.wanted:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN and handler is not None:  # None: it wasn't installed by Python
                self.caught[number] = handler
                signal.signal(number, self._handle)
        ACTIVE.append(self)
        follow_forks()

    def let_go(self) -> None:
        """Put back what was there before."""
        if self in ACTIVE:
            ACTIVE.remove(self)
            for number, handler in self.caught.items():
                if signal.getsignal(number) == self._handle:  # else the program has installed another one meanwhile
                    signal.signal(number, handler)
            signal.set_wakeup_fd(self._program_fd)
        self.receiver.close()
        self.sender.close()

    def is_programs_own(self, number: int) -> bool:
        """Whether the program had a handler of its own for a signal, which was called when the signal came."""
        handler = self.caught.get(number)
        return callable(handler) and handler is not signal.default_int_handler

    def wake(self) -> None:
        """End a call of ``wait`` in another thread."""
        with suppress(OSError):
            self.sender.send(b"\0")

    def wait(self, seconds: float) -> list[int]:
        """Return the signals that have come since the last call, in their order; wait for one where none has.

        Args:
            seconds: to wait at most.
        """
        self.receiver.settimeout(seconds)
        try:
            numbers = self.receiver.recv(4096)
        except OSError:  # the time is over
            return []
        if self._program_fd != -1:
            with suppress(OSError):  # it is full, or the program has closed it
                os.write(self._program_fd, numbers)
        return [number for number in numbers if number in self.caught]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Call the program's own handler; the signal itself is read from the socket."""
        handler = self.caught[number]
        if callable(handler) and self.is_programs_own(number):
            handler(number, frame)


ACTIVE: list[Signals] = []  # those that catch signals now: one at most, but for a run within a run's callback


@cache
def follow_forks() -> None:
    """Have processes that are forked from now on tell their signals to nobody."""
    if hasattr(os, "register_at_fork"):  # Windows can't fork
        os.register_at_fork(after_in_child=forget_in_child)


def forget_in_child() -> None:
    """Undo, in a forked process, what its parent does with signals."""
    while ACTIVE:
        active = ACTIVE.pop()
        signal.set_wakeup_fd(-1)
        for number, handler in active.caught.items():
            signal.signal(number, handler)
