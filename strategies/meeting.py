"""Ranks that begin a failed run again together: what each does next is decided in the store of their process group.

A rank that fails can't make the others leave the collective in which they wait for it. So it writes down why all should
begin again, and leaves the process group. Over gloo the others' collectives fail at once, over NCCL a thread ends them;
a rank whose collective failed finds the reason in the store. The first failure of an attempt decides for all: where it
is no reason to begin again, every failure stands.
"""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

VERDICT = "verdict"
AGAIN, ENDED = "again: ", "ended"  # what a verdict begins with
CAME = "came"  # the key of a rank that came is "came/<rank>"
SECONDS = 0.02  # between two looks into the store


def store_of_attempt(store: dist.Store, rank: int) -> dist.Store:
    """A part of the store for an attempt of its own; ranks make as many attempts as one another.

    Args:
        store: of the process group.
        rank: this one.
    """
    return dist.PrefixStore(f"attempt-{store.add(f'attempts/{rank}', 1)}", store)


def tell(store: dist.Store, reason: str | None) -> str | None:
    """Give a failure, and learn what the first failure of the attempt was.

    Args:
        store: of the attempt.
        reason: why all should begin again; None where this failure is none.

    Returns:
        The first failure's reason; None where that was none.
    """
    verdict = store.compare_set(VERDICT, "", ENDED if reason is None else AGAIN + reason).decode()
    return verdict.removeprefix(AGAIN) if verdict.startswith(AGAIN) else None


def hear(store: dist.Store, seconds: float = 60.0) -> str | None:
    """Learn what the first failure of the attempt was from the rank that gives it.

    Args:
        store: of the attempt.
        seconds: to wait; a rank that has ended meanwhile gives none.
    """
    deadline = time.monotonic() + seconds
    while not store.check([VERDICT]) and time.monotonic() < deadline:
        time.sleep(SECONDS)
    return tell(store, None)


def gather(store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
    """Return once every rank has left the process group and come here.

    Args:
        store: of the attempt.
        rank, world_size: of the process group.
        timeout: seconds to wait.

    Raises:
        RuntimeError: a rank doesn't come.
    """
    store.set(f"{CAME}/{rank}", "")
    deadline = time.monotonic() + timeout
    for other in range(world_size):
        while not store.check([f"{CAME}/{other}"]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"Rank {other} did not come to begin the run again within {timeout:.0f} s.")
            time.sleep(SECONDS)


def all_say(store: dist.Store, rank: int, world_size: int, said: str, seconds: float) -> bool:
    """Whether every rank comes here in time and says the same; all that come get one answer.

    Args:
        store: of the process group.
        rank, world_size: of it.
        said: by this rank.
        seconds: to wait for the others.
    """
    here = dist.PrefixStore(f"said-{store.add(f'said/{rank}', 1)}", store)
    here.set(str(rank), said)
    deadline, others = time.monotonic() + seconds, [str(other) for other in range(world_size)]
    while not (came := here.check(others)) and time.monotonic() < deadline:
        time.sleep(SECONDS)
    agrees = came and all(here.get(other).decode() == said for other in others)
    # A rank that comes when another one has given up must give up, too.
    return here.compare_set(VERDICT, "", "yes" if agrees else "no").decode() == "yes"


def let_go(groups: list[weakref.ref[dist.ProcessGroup]]) -> None:
    """Take process groups that were left out of whatever still holds them: a strategy, a mesh's description or a DDP
    module of another Fit in this process. They are of no use to it any more, and gloo closes a group's connections, by
    which the waiting ranks are woken, only when the last reference to it goes.
    """
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):  # not isinstance: some objects lie about their class
            vars(thing).pop("reducer", None)  # the reducer holds the group where Python can't see it
            vars(thing).pop("logger", None)
    for reference in groups:
        group = reference()
        for holder in gc.get_referrers(group) if group is not None else ():
            if type(holder) is list:  # DeepSpeed's ZeRO optimizers have a list with a group for each parameter group
                holder[:] = [None if value is group else value for value in holder]
                continue
            attributes = holder if type(holder) is dict else getattr(holder, "__dict__", {})
            for name in [name for name, value in attributes.items() if value is group]:
                attributes[name] = None
    gc.collect()


@contextmanager
def abort_when_told(store: dist.Store, seconds: float = 0.5) -> Iterator[None]:
    """In here, a thread ends this rank's NCCL collectives when another rank gives a reason to begin again: they wait on
    the device, where no closed connection wakes them.

    Not run in this repository's tests, for it needs two GPUs.

    Args:
        store: of the attempt.
        seconds: between two looks.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            if store.check([VERDICT]):
                if store.get(VERDICT).decode().startswith(AGAIN):
                    dist.distributed_c10d._abort_process_group()
                return

    thread = threading.Thread(target=watch, name="abort_when_told", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
