"""One message an update between the ranks' hosts: items, what callbacks ask for, and what failed.

What is known when, and why the ranks wait for it there::

    end of update k - 1    what callbacks ask for, wishes of signals, failed writes, buffers that change
    data of k is read      that it was read, how much of it there is, and its items
    message of k           here, and every rank knows it before it computes
    first forward of k     the first collective that a rank may be missing in: FSDP gathers, SyncBatchNorm sums, and a
                           module of the user's may do what it likes; buffers are shared before it
    first backward of k    losses are weighed by the items of all ranks
    end of k               flags and wishes are obeyed

A message that is posted and read later, while the ranks compute, would come too late for a rank without data: the
others are in a collective then that it can't join, having no batch, and that nobody can call off. Posted an update
ahead it would come in time, but the data would have to be read before the update in front of it is over: a dataset that
draws random numbers in this process would draw them in another order than on one rank, one that a callback feeds or
changes (a replay buffer, a curriculum) would be read before that, and every early end would have read more than it
used. So it is sent where everything in it is known, and made cheap: along a tree (strategies/tree.py) it is ready after
2 log2 N steps, and its length costs nothing, so that nothing need be packed and no number of ranks or items is too
large. On an accelerator the host is ahead of its device by then, which computes meanwhile.
"""

from ...strategies.base import Strategy
from ..state import Control
from ..watch.watch import Watch
from .in_step import InStep
from .pace import Pace


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
        pace: has this rank's times; None on one rank.

    Attributes:
        asked: flags that this rank has raised since the last message.
        agreed: flags that some rank had raised before the last message.
        interruption: the status that a signal to some rank asks all to end with, as of the last message; else 0.
    """

    def __init__(self, strategy: Strategy, control: Control, data: InStep, pace: Pace | None = None) -> None:
        self.strategy = strategy
        self.pace = pace
        self.control = control
        self.data = data
        self.asked = self.agreed = [0] * len(control.flags())
        self.interruption = 0

    def send(
        self,
        update: int,
        watch: Watch,
        items: int,
        write_failed: bool,
        batches: int,
        samples: int,
        error: Exception | None,
    ) -> tuple[int, bool]:
        """Exchange the message of an update. Collective.

        Args:
            update: its number.
            watch: what this rank was asked by a signal.
            items: in this rank's micro-batches.
            write_failed: whether a checkpoint couldn't be written on this rank.
            batches, samples, error: what was read, see ``InStep.numbers``.

        Returns:
            The sums over all ranks: the items, and whether a checkpoint couldn't be written on any.

        Raises:
            ValueError, OtherRankError: see ``InStep.check``.
        """
        news = int(self.strategy.has_news_of_buffers())
        numbers = self.data.numbers(batches, samples, error)
        message = [items, int(write_failed), news, watch.words(), *numbers, *self.asked]
        tells_times = self.pace is not None and self.pace.is_due(update)
        if self.pace is not None and tells_times:
            message += self.pace.numbers()
        total, failures, news, wishes, *sums = self.strategy.sum_on_host(message)
        self.interruption = watch.told(wishes)
        end_of_flags = self.data.NUMBERS + len(self.asked)
        self.agreed = sums[self.data.NUMBERS : end_of_flags]
        if self.pace is not None and tells_times:
            self.pace.note(sums[end_of_flags:])
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
