"""A roll call: every rank says where it is, from a thread, while its main thread may wait for ever."""

import time
from collections.abc import Iterable
from typing import Any

from .whereabouts import Whereabouts

CALLED = "called"  # key: how many roll calls there were
SECONDS = 3.0  # that a rank has to answer; its thread looks once a second
LOOK = 0.1  # seconds between two looks for answers


class Roll:
    """The roll calls of one run.

    Args:
        store: a part of the ranks' store for this run alone, by a connection that only one thread uses at a time.
        rank, world_size: of the run.
        host: the name of this rank's machine, which the others are told at once: a dead rank can't say it.
    """

    def __init__(self, store: Any, rank: int, world_size: int, host: str) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.answered = 0
        store.set(f"host/{rank}", host)

    def call(self) -> None:
        """Call the roll, unless there is a call that this rank hasn't answered yet. Ranks that call at the same time
        make one call.
        """
        self.store.compare_set(CALLED, str(self.answered) if self.answered else "", str(self.answered + 1))

    def is_called(self) -> bool:
        """Whether this rank has a call to answer."""
        return self.store.check([CALLED]) and int(self.store.get(CALLED)) > self.answered

    def answer(self, report: Whereabouts) -> dict[int, Whereabouts]:
        """Answer the call, and wait for the other ranks' answers.

        Returns:
            What those ranks have told that answered in time, by rank.
        """
        self.answered = number = int(self.store.get(CALLED))
        self.store.set(f"call-{number}/{self.rank}", report.to_words())
        keys = {rank: f"call-{number}/{rank}" for rank in range(self.world_size)}
        deadline = time.monotonic() + SECONDS
        while not self.store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(LOOK)
        return {
            rank: Whereabouts.from_words(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])
        }

    def part(self, answered: Iterable[int]) -> None:
        """Return when this process may end: rank 0's may hold the store, which the others are still reading.

        Args:
            answered: the ranks that will come here, too.
        """
        self.store.set(f"call-{self.answered}/parted/{self.rank}", "")
        keys = [f"call-{self.answered}/parted/{rank}" for rank in answered]
        deadline = time.monotonic() + SECONDS
        while self.rank == 0 and not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(LOOK)

    def speaks(self) -> bool:
        """Whether this rank is the one that speaks for all in the call that it answered last: the first that asks."""
        words = f"call-{self.answered}/speaker", "", str(self.rank)
        return bool(int(self.store.compare_set(*words)) == self.rank)

    def hosts(self) -> dict[int, str]:
        """The machine of every rank."""
        keys = {rank: f"host/{rank}" for rank in range(self.world_size)}
        return {
            rank: self.store.get(key).decode() if self.store.check([key]) else "unknown" for rank, key in keys.items()
        }
