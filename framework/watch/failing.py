"""What a rank does with an exception that ends it: tell the others, or name the rank that failed before it."""

import sys
import time
from collections.abc import Callable

import torch.distributed as dist

from ...strategies.failures import Failure, Failures, failure_of
from ..printing import say
from .endings import AnotherRankFailed
from .hang_report import sentence
from .roll import Roll
from .whereabouts import Whereabouts

SECONDS = 2.0  # that a rank which lost a connection waits for the one behind it to say why
LOOK = 0.05  # seconds between two looks
OF_CONNECTIONS = ("gloo", "Connection closed", "Connection reset", "NCCL", "Broken pipe", "Timed out waiting")


def settle(error: BaseException, failures: Failures, roll: Roll, where: Callable[[], Whereabouts]) -> None:
    """Tell the other ranks what ends this one, unless it is another rank's failure.

    Args:
        error: that ends this rank's run.
        failures: where ranks tell theirs.
        roll: finds out which rank is gone without a word.
        where: tells where this rank is.

    Raises:
        AnotherRankFailed: in place of the error, which only says that a connection is gone.
    """
    if not is_about_connection(error):
        failures.tell(failure_of(roll.rank, error))
        return
    deadline = time.monotonic() + SECONDS
    while (first := failures.first()) is None and time.monotonic() < deadline:
        time.sleep(LOOK)
    if first is None:
        roll.call()
        alive = roll.answer(where())
        hosts = roll.hosts()
        missing = sorted(hosts.keys() - alive.keys())
        if not missing:  # all are alive: they wait in different collectives, or the network is at fault
            if roll.speaks():
                say(f"Where the ranks are: {sentence(alive, hosts)}", sys.stderr)
            failures.tell(failure_of(roll.rank, error))
            return
        gone = missing[0]
        update = next(iter(alive.values())).update
        mine = Failure(gone, hosts[gone], f"gone without a word in update {update}: killed, out of memory, or cut off")
        first = failures.tell(mine)
        if roll.speaks():
            say(f"Failed first: {first}.", sys.stderr)
    if first.rank == roll.rank:
        return
    raise AnotherRankFailed(first) from None


def is_about_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another rank can't be reached."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OF_CONNECTIONS)
