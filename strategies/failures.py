"""The first failure of a run on several ranks: told once in the store that they met by, and read there by all others.

A rank whose peer is gone fails too, by an error about a connection, and that error is often the first on the screen.
So whoever fails writes down its failure unless there is one already, and whoever fails later names that one.
"""

import dataclasses
import json
import socket
import traceback
from dataclasses import dataclass

import torch.distributed as dist

FAILURE = "failure"  # the key in the store of one attempt


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


def tell(store: dist.Store, failure: Failure) -> Failure:
    """Write a failure down, unless another one came first.

    Args:
        store: of the process group's attempt.
        failure: of this rank, or of one that a launcher found dead.

    Returns:
        The first one.
    """
    written = store.compare_set(FAILURE, "", json.dumps(dataclasses.asdict(failure)))
    return Failure(**json.loads(written))


def first_failure(store: dist.Store) -> Failure | None:
    """Return the first failure; None where nothing has failed. Doesn't wait."""
    return Failure(**json.loads(store.get(FAILURE))) if store.check([FAILURE]) else None
