"""Row: the order of an epoch, up to its first batches, at its beginning and in its middle."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ... import FitArguments
from ...framework.data import make_stream
from ...framework.data.orders import ComputedOrder
from ...strategies import Strategy
from .measuring import measuring

SAMPLES, BATCH_SIZE, BATCHES = 10_000_000, 256, 64
TITLE = f"A shuffled epoch of {SAMPLES:,} samples: {BATCHES} batches of {BATCH_SIZE} at its beginning and in its middle"
ROUNDS = 3
LIMIT = "each batch's computed order alone"


class Indices(Dataset):
    """Samples that are their index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


def first_batches(begin: Callable[[bool], Iterator[Any]], middle: bool) -> dict[str, float]:
    """Begin an epoch and read its first batches: what the first took, and each of the others."""
    began = time.process_time()
    batches = begin(middle)
    next(batches)
    then = time.process_time()
    for _ in itertools.islice(batches, BATCHES - 1):
        pass
    each = (time.process_time() - then) / (BATCHES - 1)
    return {"CPU ms to the first": 1e3 * (then - began), "CPU us a batch": 1e6 * each}


def stratagem() -> dict[str, float]:
    """A stream of a Fit's, which a resume puts into the middle."""
    stream = make_stream(Indices(), FitArguments(per_device_train_batch_size=BATCH_SIZE), Strategy(), training=True)
    return measured(lambda middle: from_middle(stream) if middle else stream.epoch(0))


def from_middle(stream: Any) -> Iterator[Any]:
    """Go on in the middle of an epoch."""
    stream.load_state_dict({**stream.state_dict(), "position": SAMPLES // 2})
    return stream.epoch(1)


def loader(middle: bool) -> Iterator[Any]:
    """A bare DataLoader, whose batches up to the middle are indices that are read over."""
    sampler = RandomSampler(Indices())
    if not middle:
        return iter(DataLoader(Indices(), BATCH_SIZE, sampler=sampler, collate_fn=torch.tensor))
    rest = itertools.islice(sampler, SAMPLES // 2, None)
    return iter(DataLoader(Indices(), BATCH_SIZE, sampler=rest, collate_fn=torch.tensor))


def drawn(middle: bool) -> Iterator[Any]:
    """A permutation that is drawn, and sliced."""
    order = torch.randperm(SAMPLES)
    begin = SAMPLES // 2 if middle else 0
    return (order[start : start + BATCH_SIZE] for start in range(begin, SAMPLES, BATCH_SIZE))


def computed(middle: bool) -> Iterator[Any]:
    """The computed order, asked batch by batch, without a stream around it."""
    order = ComputedOrder(SAMPLES, 0, int(middle))
    begin = SAMPLES // 2 if middle else 0
    return (order(numpy.arange(start, start + BATCH_SIZE)) for start in range(begin, SAMPLES, BATCH_SIZE))


def measured(begin: Callable[[bool], Iterator[Any]]) -> dict[str, float]:
    """Measure both beginnings, and their memory; a batch and the first one are those of the middle."""
    with measuring() as figures:
        first_batches(begin, False)
        parts = first_batches(begin, True)
    return {**figures, **parts}


CONTESTANTS = {
    "stratagem": stratagem,
    "a drawn permutation, sliced": lambda: measured(drawn),
    "bare DataLoader": lambda: measured(loader),
    LIMIT: lambda: measured(computed),
}
