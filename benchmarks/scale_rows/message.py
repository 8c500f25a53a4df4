"""Row: what the ranks' hosts tell one another once an update."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...strategies.tree import sum_along_tree

TITLE = "The hosts' message of an update: 14 numbers, summed over 4 ranks (gloo)"
ROUNDS = 5
LIMIT = "by hand: one number round gloo's ring"
RANKS, NUMBERS, WARM_UP, TURNS, MESSAGES = 4, 14, 20, 20, 20
CPU, WALL, LONGEST = "CPU us a rank", "wall us", "messages one after another"


def by_gloo(numbers: int) -> list[int]:
    """An all-reduce."""
    tensor = torch.ones(numbers, dtype=torch.int64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def by_tree() -> list[int]:
    """As every strategy with several ranks does it."""
    return sum_along_tree([1] * NUMBERS, dist.group.WORLD)


def by_objects() -> list[Any]:
    """What a framework writes that has no message of numbers: every rank's list, pickled, on every rank."""
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, [1] * NUMBERS)
    return found


def be_rank(rank: int, store: str, exchange: Callable[[], list[Any]], results: Any) -> None:
    """Exchange messages, and tell what one of them took: CPU seconds of this rank, and seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for _ in range(WARM_UP):
        exchange()
    turns = []
    for _ in range(TURNS):
        computing, wall = time.process_time(), time.perf_counter()
        for _ in range(MESSAGES):
            exchange()
        turns.append(((time.process_time() - computing) / MESSAGES, (time.perf_counter() - wall) / MESSAGES))
    # A turn in which Python collects garbage, or another program has the cores, is no measure of a message.
    results.put(tuple(map(statistics.median, zip(*turns, strict=True))))
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's threads end a little later than the group


def measure(exchange: Callable[[], list[Any]], longest: int) -> dict[str, float]:
    """Start the ranks, and take the mean of what they tell."""
    context = multiprocessing.get_context("fork")  # else each rank imports torch, which takes longer than all messages
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            context.Process(target=be_rank, args=(rank, f"{directory}/store", exchange, results))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        told = [results.get(timeout=120) for _ in ranks]
        for process in ranks:
            process.join()
    computing, wall = (sum(of_ranks) / RANKS * 1e6 for of_ranks in zip(*told, strict=True))
    return {CPU: computing, WALL: wall, LONGEST: float(longest)}


CONTESTANTS = {
    "stratagem: along a tree": partial(measure, by_tree, 2 * (RANKS - 1).bit_length()),
    LIMIT: partial(measure, partial(by_gloo, 1), 2 * (RANKS - 1)),
    "14 numbers round gloo's ring": partial(measure, partial(by_gloo, NUMBERS), 2 * (RANKS - 1)),
    "14 numbers, gathered as an object": partial(measure, by_objects, 2 * (RANKS - 1)),
}
