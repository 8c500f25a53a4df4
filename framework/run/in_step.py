"""The check that ranks read their data in step: all ranks learn where the data ends, or fails, on one of them."""

import itertools
from collections.abc import Iterator
from typing import Any

from ...strategies.base import Strategy
from ..data import DataStream
from ..watch.endings import EvaluationInterrupted
from ..watch.watch import Watch

AHEAD = 8  # micro-batches of an evaluation that are read before they are computed with


class OtherRankError(RuntimeError):
    """The error of another rank, raised on this one. The rank that failed decides what becomes of the run."""


class InStep:
    """Compares how many micro-batches the ranks have read, by a few numbers that are summed over all ranks.

    Args:
        strategy: it exchanges the numbers.
        name: what errors call the data.
    """

    NUMBERS = 5

    def __init__(self, strategy: Strategy, name: str) -> None:
        self.strategy = strategy
        self.name = name
        self.read = 0  # the micro-batches of this epoch that this rank has read

    def begin_epoch(self) -> None:
        """Count from 0 again."""
        self.read = 0

    def numbers(self, batches: int, samples: int, error: Exception | None) -> list[int]:
        """Return the numbers that this rank adds to the sums. The ranks' values are equal where the sum of their
        squares, times the number of ranks, is the square of their sum.

        Args:
            batches: micro-batches that were read for this message.
            samples: samples in them over all ranks, as this rank counts them.
            error: the error of reading, where there was one.
        """
        self.read += batches
        return [int(error is not None), batches, batches * batches, samples, samples * samples]

    def check(self, sums: list[int], samples: int, error: Exception | None) -> None:
        """Raise on every rank where reading failed on one, or the numbers differ.

        Args:
            sums: the sums of ``numbers`` over all ranks.
            samples, error: what this rank gave to ``numbers``.

        Raises:
            ValueError: the data of the ranks isn't equally long; the message says how much each has.
            OtherRankError: reading failed on another rank. That rank raises the error itself.
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
            "same order: each is then handed its own part of every global micro-batch. One that is split by rank says "
            "shares_among_ranks = True and has shard(num_shards, index)."
        )


class Pass:
    """An evaluation's micro-batches on this rank, see ``in_step``, and how many samples they have at most.

    Args:
        strategy, stream, batches, watch: see ``in_step``.

    Attributes:
        rows: samples at most; 0 where that isn't known.
    """

    def __init__(
        self, strategy: Strategy, stream: DataStream, batches: Iterator[Any], watch: Watch | None = None
    ) -> None:
        alone = strategy.world_size == 1 and watch is None
        self.batches = batches if alone else in_step(strategy, stream, batches, watch)
        total = stream.num_examples
        self.rows = 0 if total is None else min(total, len(stream) * stream.options.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def in_step(
    strategy: Strategy, stream: DataStream, batches: Iterator[Any], watch: Watch | None = None
) -> Iterator[Any]:
    """Hand out an evaluation's micro-batches, of which every rank must have equally many. Collective once for several
    of them, where the ranks might not have, or where a signal to one of them ends the evaluation on all.

    Args:
        strategy: set up.
        stream, batches: of this rank.
        watch: of the run in which this is evaluated; None outside of one.

    Raises:
        ValueError, OtherRankError: see ``InStep.check``.
        EvaluationInterrupted: a signal asked the run to end.
    """
    if strategy.world_size == 1 or (stream.is_equal_on_ranks and watch is None):
        for batch in batches:
            if watch is not None:
                if watch.wish and watch.may_break:
                    raise EvaluationInterrupted(watch.wish)
                watch.note_batch()
            yield batch
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
        numbers = comparison.numbers(len(ahead), samples, failure)
        wishes, *sums = strategy.sum_on_host([watch.words() if watch is not None and watch.may_break else 0, *numbers])
        comparison.check(sums, samples, failure)
        if wishes:
            raise EvaluationInterrupted(Watch.told(wishes))
        if not ahead:
            return
        for batch in ahead:
            if watch is not None:
                watch.note_batch()
            yield batch
