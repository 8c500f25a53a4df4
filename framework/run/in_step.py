"""Whether the ranks read their data in step: what ends it on one of them, or fails there, is known on all."""

import itertools
from collections.abc import Iterator
from typing import Any

from ...strategies.base import Strategy
from ..data import DataStream

AHEAD = 8  # micro-batches of an evaluation that are read before they are computed with


class OtherRankError(RuntimeError):
    """What another rank failed with, on this one: that rank decides what becomes of the run."""


class InStep:
    """Compares how many micro-batches the ranks have read, by a few numbers that are summed over all.

    Args:
        strategy: of the ranks.
        name: of the data, in errors.
    """

    NUMBERS = 5

    def __init__(self, strategy: Strategy, name: str) -> None:
        self.strategy = strategy
        self.name = name
        self.read = 0  # micro-batches of this epoch, on this rank

    def begin_epoch(self) -> None:
        """Count anew."""
        self.read = 0

    def numbers(self, batches: int, samples: int, error: Exception | None) -> list[int]:
        """What this rank puts into a message: the ranks' numbers are equal where the sum of their squares, times their
        number, is the square of their sum.

        Args:
            batches: read for this message.
            samples: that they hold over all ranks, as this rank sees it.
            error: what reading failed with.
        """
        self.read += batches
        return [int(error is not None), batches, batches * batches, samples, samples * samples]

    def check(self, sums: list[int], samples: int, error: Exception | None) -> None:
        """Raise on every rank where reading failed on one, or the numbers differ.

        Args:
            sums: of ``numbers`` over all ranks.
            samples, error: this rank's, as it gave them.

        Raises:
            ValueError: the ranks' data isn't equally long; says how much each has.
            OtherRankError: what reading failed with on another rank; there, that error itself.
        """
        failures, *pairs = sums
        world = self.strategy.world_size
        if not failures and world * pairs[1] == pairs[0] ** 2 and world * pairs[3] == pairs[2] ** 2:
            return
        said = None if error is None else f"{type(error).__name__}: {error}"
        everyones = self.strategy.gather((said, self.read, samples))
        if error is not None:
            raise error
        for rank, (why, _, _) in enumerate(everyones):
            if why is not None:
                raise OtherRankError(f"Rank {rank} failed while it read its {self.name}: {why}")
        counts = [read for _, read, _ in everyones]
        least = min(counts)
        if least < max(counts):
            short = ", ".join(f"rank {rank}" for rank, count in enumerate(counts) if count == least)
            others = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(counts) if count > least)
            what = f"{short} ran out after {least} micro-batches of this epoch, with more elsewhere ({others})"
        else:
            what = "the last micro-batches hold, over all ranks, " + ", ".join(
                f"{seen} samples as rank {rank} sees it" for rank, (_, _, seen) in enumerate(everyones)
            )
        raise ValueError(
            f"The ranks' {self.name} isn't equally long: {what}. Every rank must iterate over the whole of it, in the "
            "same order: each is then handed its own part of every global micro-batch. Don't split an iterable by rank."
        )


def in_step(strategy: Strategy, stream: DataStream, batches: Iterator[Any]) -> Iterator[Any]:
    """Hand out an evaluation's micro-batches, of which every rank must have equally many. Collective once for several
    of them, where the ranks might not have.

    Raises:
        ValueError, OtherRankError: see ``InStep.check``.
    """
    if strategy.world_size == 1 or stream.is_equal_on_ranks:
        yield from batches
        return
    comparison = InStep(strategy, "evaluation data")
    while True:
        position = stream.position
        failure: Exception | None = None
        ahead: list[Any] = []
        try:
            ahead = list(itertools.islice(batches, AHEAD))
        except Exception as error:
            failure = error
        samples = stream.position - position
        comparison.check(strategy.sum_on_host(comparison.numbers(len(ahead), samples, failure)), samples, failure)
        if not ahead:
            return
        yield from ahead
