"""What a row measures of a piece of work: seconds of computing, of waiting, and memory beyond that at its start."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...framework.callbacks import Callback

CPU, WALL, PEAK = "CPU s", "wall s", "peak MiB"


@contextmanager
def measuring(pieces: int = 1) -> Iterator[dict[str, float]]:
    """Measure what is done in here, on all of this process's threads.

    Args:
        pieces: that the time is divided by, as updates or batches.

    Yields:
        The figures, which are there once the block has ended: "CPU s" and "wall s" a piece, and "peak MiB" of resident
        memory beyond that at the start.
    """
    figures: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = kibibytes("VmRSS")
    wall, computing = time.perf_counter(), time.process_time()
    yield figures
    figures[CPU] = (time.process_time() - computing) / pieces
    figures[WALL] = (time.perf_counter() - wall) / pieces
    figures[PEAK] = max(0, kibibytes("VmHWM") - resident) / 1024


class Between(Callback):
    """Measures a Fit's updates from the end of its warm-up to the end of the run.

    Args:
        warm_up, updates: how many of each.

    Attributes:
        figures: there when the run has ended, an update.
    """

    def __init__(self, warm_up: int, updates: int) -> None:
        self.warm_up, self.updates = warm_up, updates
        self.block = measuring(updates)

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == self.warm_up:
            self.figures = self.block.__enter__()
        elif state.global_step == self.warm_up + self.updates:
            self.block.__exit__(None, None, None)


def kibibytes(name: str) -> int:
    """Read a size of this process from Linux, such as "VmHWM", its peak of resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
