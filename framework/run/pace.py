"""Which rank is the slowest: each rank's own time rides in the message of some updates, and the log names one rank."""

import statistics
from time import perf_counter_ns

from ..arguments import FitArguments

EVERY = 32  # updates, at most, between two messages with times


class Pace:
    """Measures the time that this rank takes for itself, as far as it doesn't wait for others there.

    A rank's own time is an update's but for what it waits in: the last backward, in which gradients are reduced, the
    ranks' message, and logs, evaluations and checkpoints. It holds forwards, losses, the backwards of all other
    micro-batches, the optimizer and callbacks; reading the data is measured apart. Where forward itself waits for other
    ranks, forwards and backwards are left out: what a rank loses there can't be told from what it waits there.

    On the CPU this is work done. On an accelerator it is the time in which the host hands work out: it shows a slow
    host, dataset or callback, and no slow chip.

    Args:
        args: of the run, whose logs are what the times are for.
        rank, world_size: this rank among all, of which there are several.
        forward_waits: see ``Strategy.forward_waits``.
    """

    def __init__(self, args: FitArguments, rank: int, world_size: int, forward_waits: bool) -> None:
        self.forward_waits = forward_waits
        self.args, self.rank, self.world_size = args, rank, world_size
        self._own = self._reading = 0  # nanoseconds since the last message with times
        self._last_backward = 0
        self._since: int | None = None  # when the piece of work that is under way began
        self._updates = 0
        self._own_of_ranks = [0] * world_size  # microseconds since the last log
        self._reading_of_ranks = [0] * world_size
        self._updates_told = 0

    # One update, in the order of what happens.

    def begin_reading(self) -> None:
        """Note that this rank begins to read an update's data."""
        self._since = perf_counter_ns()

    def end_reading(self) -> None:
        """Note that the data is there."""
        if self._since is not None:
            self._reading += perf_counter_ns() - self._since

    def begin_update(self) -> None:
        """Note that the ranks' message is exchanged, and this rank's own work begins."""
        self._last_backward = 0
        self._since = perf_counter_ns()

    def begin_forward(self) -> None:
        """Note that a micro-batch is about to be computed; asked for where forward waits."""
        if self._since is not None:
            self._own += perf_counter_ns() - self._since

    def begin_backward(self) -> None:
        """Note that a micro-batch's loss is there. The backward before it wasn't the last."""
        if not self.forward_waits and self._since is not None:
            now = perf_counter_ns()
            self._own += now - self._since + self._last_backward
            self._since = now

    def end_backward(self) -> None:
        """Note that a micro-batch's gradients are there."""
        if self._since is not None:
            now = perf_counter_ns()
            self._last_backward = now - self._since
            self._since = now

    def end_update(self) -> None:
        """Note that an update is over, and what follows are logs and the like."""
        if self._since is not None:
            self._own += perf_counter_ns() - self._since
            self._since = None
            self._updates += 1

    # Telling.

    def is_due(self, update: int) -> bool:
        """Whether the message of an update holds times: before a log, as far as it is foreseen, and now and then."""
        by_steps = self.args.logging_strategy == "steps"
        return update % EVERY == 0 or (
            by_steps and (update % self.args.logging_steps == 0 or update == self.args.max_steps)
        )

    def numbers(self) -> list[int]:
        """Return what this rank adds to the sums: its own time and its time of reading, in microseconds, each in its
        rank's place among zeros.
        """
        found = [0] * (2 * self.world_size)
        found[self.rank] = self._own // 1000
        found[self.world_size + self.rank] = self._reading // 1000
        return found

    def note(self, sums: list[int]) -> None:
        """Take note of the sums of ``numbers`` over all ranks."""
        own, reading = sums[: self.world_size], sums[self.world_size :]
        self._own_of_ranks = [a + b for a, b in zip(self._own_of_ranks, own, strict=True)]
        self._reading_of_ranks = [a + b for a, b in zip(self._reading_of_ranks, reading, strict=True)]
        self._updates_told += self._updates
        self._own = self._reading = self._updates = 0

    def take(self) -> dict[str, float]:
        """Return the numbers for a log, over what was told since the last one: the slowest rank, its time relative to
        the median of all (of two ranks, to the faster one), and the seconds that an update waits for data on the rank
        where that is longest. Nothing where no update was told of.
        """
        own, reading, updates = self._own_of_ranks, self._reading_of_ranks, self._updates_told
        self._own_of_ranks, self._reading_of_ranks = [0] * self.world_size, [0] * self.world_size
        self._updates_told = 0
        times = [a + b for a, b in zip(own, reading, strict=True)]
        median = statistics.median_low(times)
        if not updates or not median:
            return {}
        longest = max(times)
        return {
            "slowest_rank": times.index(longest),
            "slowest_rank_ratio": round(longest / median, 3),
            "data_wait_seconds": max(reading) / updates / 1e6,
        }
