"""The first failure of a run on several ranks: told once in the store that they met by, and read there by all others.

A rank whose peer is gone fails too, by an error about a connection, and that error is often the first on the screen.
So whoever fails writes down its failure unless there is one already, and whoever fails later names that one.
"""

import dataclasses
import json
import socket
import traceback
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

FAILURE = "failure"  # key: what a rank itself has told
SECONDS = 2.0  # that the store's process has to take a connection
DEAD = "dead"  # key: what a launcher tells of a rank that it found dead, in the store of the attempt


@dataclass(frozen=True)
class Failure:
    """What ended a rank.

    Attributes:
        rank: that failed.
        host: the name of its machine.
        what: in one line.
        traceback: where it was raised; empty where the process was killed.
    """

    rank: int
    host: str
    what: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}): {self.what}"


def failure_of(rank: int, error: BaseException) -> Failure:
    """Describe an exception that ends this rank."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return Failure(rank, socket.gethostname(), f"{type(error).__name__}: {error}", "".join(lines))


class Failures:
    """Where the ranks of one run tell what ended them.

    Args:
        run: a part of the store for this run alone: a program may train several times.
        attempt: the store of the launcher's attempt, which the launcher reads and writes.
    """

    def __init__(self, run: dist.Store, attempt: dist.Store) -> None:
        self.run, self.attempt = run, attempt
        whole: Any = run
        while isinstance(whole, dist.PrefixStore):
            whole = whole.underlying_store
        self.address = (whole.host, whole.port) if isinstance(whole, dist.TCPStore) else None

    def tell(self, failure: Failure) -> Failure:
        """Write a failure down, unless another one came first.

        Returns:
            The first one.
        """
        first = self.first()
        if first is None:
            words = as_words(failure)
            first = from_words(self.run.compare_set(FAILURE, "", words))
            if first == failure:
                self.attempt.set(FAILURE, words)  # over that of an earlier run, which this process has survived
        return first

    def is_reachable(self) -> bool:
        """Whether the store's process takes connections. torch's store prints pages where it doesn't."""
        if self.address is None:
            return True
        try:
            socket.create_connection(self.address, timeout=SECONDS).close()
        except OSError:
            return False
        return True

    def holder(self) -> Failure:
        """Describe the process that holds the store as gone: rank 0, or the launcher."""
        host = "unknown" if self.address is None else self.address[0]
        return Failure(0, host, "gone without a word, or the launcher there is, and with it the ranks' store")

    def first(self) -> Failure | None:
        """Return the first failure; None where nothing has failed. Doesn't wait for one."""
        if self.run.check([FAILURE]):
            return from_words(self.run.get(FAILURE))
        return found_dead(self.attempt)


def told(attempt: dist.Store) -> Failure | None:
    """Return the failure that a rank of the attempt has told itself; None where none has."""
    return from_words(attempt.get(FAILURE)) if attempt.check([FAILURE]) else None


def tell_dead(attempt: dist.Store, failure: Failure) -> None:
    """Write down, for the launcher of a rank, that it is dead. The first one stays."""
    attempt.compare_set(DEAD, "", as_words(failure))


def found_dead(attempt: dist.Store) -> Failure | None:
    """Return the first rank that its launcher found dead; None where there is none."""
    return from_words(attempt.get(DEAD)) if attempt.check([DEAD]) else None


def as_words(failure: Failure) -> str:
    """A failure as the store holds it."""
    return json.dumps(dataclasses.asdict(failure))


def from_words(words: str | bytes) -> Failure:
    """The failure that the store holds."""
    return Failure(**json.loads(words))
