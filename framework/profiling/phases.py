"""How long the phases of a run take, by the clock of the host."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PHASES = ("data", "forward", "backward", "gradients", "optimizer", "evaluation", "saving", "logging")
OTHER = "other"
"""What is in no phase: callbacks, moving batches, bookkeeping."""


class Phases:
    """Adds up the time of each phase, the outermost where one is within another.

    Attributes:
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.depth = 0
        self.paused = 0.0  # since the beginning
        self.began = time.perf_counter()
        self.whole: float | None = None

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Entered around a phase."""
        if self.depth or self.whole is not None:
            yield
            return
        self.depth, paused, began = 1, self.paused, time.perf_counter()
        try:
            yield
        finally:
            self.depth = 0
            spent = time.perf_counter() - began - (self.paused - paused)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Entered around what is not the run's own work."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - began

    def end(self) -> None:
        """Stop the clock."""
        if self.whole is None:
            self.whole = time.perf_counter() - self.began - self.paused

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return ``{"forward": {"seconds": ..., "share": of the whole time}, ...}``, all phases and the rest."""
        assert self.whole is not None
        seconds = {phase: self.seconds.get(phase, 0.0) for phase in PHASES}
        seconds[OTHER] = max(0.0, self.whole - sum(seconds.values()))
        return {phase: {"seconds": spent, "share": spent / self.whole} for phase, spent in seconds.items()}
