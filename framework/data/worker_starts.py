"""How long worker processes take to start at each epoch, which is said once where it is much of a run."""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

SECONDS, PART = 30.0, 0.25
"""Less than either, of the time since the first epoch began, is nothing to speak of."""


class WorkerStarts:
    """Measures the starts of worker processes that end with each epoch.

    Args:
        workers: how many are started.
        clock: tells seconds.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.workers, self.clock = workers, clock
        self.seconds = 0.0
        self.since: float | None = None  # None where nothing is measured, or once it was said

    def epoch(self, loader: Any) -> Iterator[Any]:
        """Begin an epoch of a loader, and return an iterator over its batches."""
        begun = self.clock()
        if self.since is None:
            self.since = begun
        batches = iter(loader)
        self.seconds += self.clock() - begun
        return self._measured(batches)

    def _measured(self, batches: Iterator[Any]) -> Iterator[Any]:
        begun = self.clock()
        for first in batches:
            self.seconds += self.clock() - begun
            self.say_once()
            yield first
            break
        yield from batches

    def say_once(self) -> None:
        """Warn where the starts took long, once."""
        assert self.since is not None
        passed = self.clock() - self.since
        if self.seconds < max(SECONDS, PART * passed):
            return
        warnings.warn(
            f"Starting {self.workers} worker processes anew at each epoch took {self.seconds:.0f} of the last "
            f"{passed:.0f} seconds. dataloader_persistent_workers=True keeps them, and gives the same batches where "
            "the dataset is changed between epochs by its set_epoch alone, and its samples don't depend on what it "
            "remembers. Or set dataloader_num_workers=0.",
            stacklevel=2,
        )
        self.seconds = float("-inf")
