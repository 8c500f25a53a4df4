"""What the benchmarks time alike: loops that take turns, updates between two readings of a clock, random tokens."""

import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

WARM_UP = 2  # updates of each turn that aren't timed


class Tokens(Dataset):
    """Random tokens, cut up beforehand."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(vocabulary, (count, length + 1), generator=generator).unbind()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.rows[index][:-1], "labels": self.rows[index][1:]}


class Timing(NamedTuple):
    """Seconds per update: that passed, and that this process was computing."""

    wall: float
    computing: float


class Clock:
    """Times the updates of a turn, each from its beginning to the next one's, so that the start and the end of a run
    stay out.

    A GPU is waited for where the timed updates begin and where they end, and never in between: a host that waited in
    each update could not prepare the next one meanwhile, as it does in a run.

    Args:
        device: that computes.
        updates: timed ones in a turn. ``WARM_UP`` come before them, and one begins after them.
    """

    def __init__(self, device: torch.device, updates: int) -> None:
        self.device, self.updates = device, updates
        self.readings: list[tuple[float, float]] = []

    @property
    def updates_of_a_turn(self) -> int:
        """All that must be run, timed or not."""
        return WARM_UP + self.updates + 1

    def start(self) -> None:
        """A turn begins."""
        self.readings = []

    def tick(self) -> None:
        """An update begins."""
        if self.device.type == "cuda" and len(self.readings) in (WARM_UP, WARM_UP + self.updates):
            torch.cuda.synchronize(self.device)
        self.readings.append((time.perf_counter(), time.process_time()))

    def timing(self) -> Timing:
        """Of the turn that ended: the median update on a CPU, which other programs disturb; the mean on a GPU, whose
        single updates aren't seen. What was computed is a mean.
        """
        if len(self.readings) != self.updates_of_a_turn:
            raise RuntimeError(f"{len(self.readings)} updates began in a turn of {self.updates_of_a_turn}.")
        wall, computing = zip(*self.readings[WARM_UP:], strict=True)
        if self.device.type == "cuda":
            passed = (wall[-1] - wall[0]) / self.updates
        else:
            passed = statistics.median(end - begin for begin, end in itertools.pairwise(wall))
        return Timing(passed, (computing[-1] - computing[0]) / self.updates)


def in_turns(loops: dict[Any, Any], round_number: int) -> list[tuple[Any, Any]]:
    """The loops in the order of a round: there and back, so that none always follows the same one."""
    return list(loops.items())[:: 1 if round_number % 2 == 0 else -1]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower one, the median and the upper one; of a single value, that."""
    low, middle, high = statistics.quantiles(values if len(values) > 1 else 2 * values, n=4, method="inclusive")
    return low, middle, high
