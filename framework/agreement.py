"""Ranks that stay together: the same run on all of them, one message an update, and what fails on one fails on all."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..strategies.base import Strategy
from .in_step import InStep
from .state import Control

Result = TypeVar("Result")


def check_ranks_agree(strategy: Strategy, description: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every rank's description of its run with rank 0's. Collective; fails on every rank or on none.

    Args:
        strategy: set up.
        description: part of the run ("argument", "parameter") to field to value; small host values.

    Raises:
        ValueError: names the ranks and fields that differ.
    """
    everyones = strategy.gather(description)
    differences = [
        f"rank {rank}: {part} {field} is {mine.get(field, 'absent')!r}, on rank 0 {theirs.get(field, 'absent')!r}"
        for rank, other in enumerate(everyones)
        for part in description
        for mine, theirs in [(other[part], everyones[0][part])]
        for field in sorted({*mine, *theirs})
        if mine.get(field, "absent") != theirs.get(field, "absent")
    ]
    if differences:
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise ValueError("The ranks were given different runs:\n  " + "\n  ".join(differences[:10]) + more)


def on_all_ranks(
    strategy: Strategy, action: Callable[[], Result], error: type[Exception], group: Any = None
) -> list[Result]:
    """Do something on every rank; where one fails, all raise, so that none waits for another. Collective.

    Args:
        strategy: exchanges the outcomes.
        action: this rank's part.
        error: class to raise.
        group: the ranks' group to use, in another thread than training's.

    Returns:
        Every rank's result.

    Raises:
        error: names the first rank that failed, and why.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as caught:
        failure = caught
    # Not its repr, which leaves out the file that an OSError is about.
    said = None if failure is None else str(failure) if isinstance(failure, error) else describe(failure)
    outcomes = strategy.gather((result, said), group)
    failed = {rank: why for rank, (_, why) in enumerate(outcomes) if why is not None}
    if failed:
        where = "" if len(outcomes) == 1 else f"rank {min(failed)}: "
        raise error(where + failed[min(failed)]) from failure
    return [outcome for outcome, _ in outcomes]


def describe(error: BaseException) -> str:
    """An error in one line, as the end of a traceback gives it."""
    return f"{type(error).__name__}: {error}"


class UpdateExchange:
    """What the ranks tell one another once an update, in one message between their hosts: how many micro-batches and
    items they hold, what their callbacks ask for, whether something failed, and whether buffers change that the ranks
    don't share yet.

    What a callback asks for at the end of an update goes out with the next update's message, and is obeyed by all at
    that one's end: no rank waits for another more often than once an update.

    Args:
        strategy: set up.
        control: this rank's flags.
        data: compares how much the ranks have read.
    """

    def __init__(self, strategy: Strategy, control: Control, data: InStep) -> None:
        self.strategy = strategy
        self.control = control
        self.data = data
        self.asked = self.agreed = control.flags()  # on this rank since the last message; on any rank before it

    def send(
        self, items: int, write_failed: bool, batches: int, samples: int, error: Exception | None
    ) -> tuple[int, bool]:
        """Exchange the message of an update. Collective.

        Args:
            items: in this rank's micro-batches.
            write_failed: whether a checkpoint couldn't be written on this rank.
            batches, samples, error: what was read, see ``InStep.numbers``.

        Returns:
            The sums over all ranks: the items, and whether a checkpoint couldn't be written on any.

        Raises:
            ValueError, OtherRankError: see ``InStep.check``.
        """
        news = int(self.strategy.has_news_of_buffers())
        message = [items, int(write_failed), news, *self.data.numbers(batches, samples, error), *self.asked]
        total, failures, news, *sums = self.strategy.sum_on_host(message)
        self.agreed = sums[self.data.NUMBERS :]
        self.data.check(sums[: self.data.NUMBERS], samples, error)
        self.strategy.share_buffers(news > 0)
        return total, failures > 0

    def agree(self, due: list[int]) -> None:
        """Leave up those flags that are up on every rank: what is due, and what the last message told.

        Args:
            due: the flags as they were before callbacks could ask for more; the same on every rank.
        """
        self.asked = [int(flag and not now) for flag, now in zip(self.control.flags(), due, strict=True)]
        self.control.set([int(now or known) for now, known in zip(due, self.agreed, strict=True)])
