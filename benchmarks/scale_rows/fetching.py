"""Row: batches of data in memory, shuffled: 32 numbers and a label each."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ...framework.arguments import FitArguments
from ...framework.data import make_stream
from ...strategies.base import Strategy

TITLE = "Fetching a batch of data in memory, one process"
ROUNDS = 5
LIMIT = "one index a batch"
ROWS, WIDTH, BATCHES = 300_000, 32, {256: 800, 32: 2_000, 4096: 60}


def columns() -> tuple[Tensor, Tensor]:
    """The data, by column."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return x, torch.randint(0, 10, (ROWS,), generator=generator)


def timed(epoch: Any) -> dict[str, float]:
    """Microseconds of computing a batch.

    Args:
        epoch: a function of a batch size to an iterator over the batches.
    """
    figures = {}
    for size, count in BATCHES.items():
        batches: Iterator[Any] = epoch(size)
        for _ in range(5):
            next(batches)
        begun = time.process_time()
        for _ in range(count):
            next(batches)
        figures[f"CPU µs at {size}"] = (time.process_time() - begun) / count * 1e6
    return figures


def by_stratagem(data: Any) -> dict[str, float]:
    """Our stream over some data."""

    def epoch(size: int) -> Iterator[Any]:
        strategy = Strategy()
        strategy.data_rank, strategy.data_size = 0, 1
        return make_stream(data, FitArguments(per_device_train_batch_size=size), strategy, training=True).epoch(0)

    return timed(epoch)


def tensor_dataset() -> dict[str, float]:
    """A TensorDataset, as a Fit reads it."""
    return by_stratagem(TensorDataset(*columns()))


def mapping() -> dict[str, float]:
    """A mapping of arrays, as a Fit reads it."""
    x, y = columns()
    return by_stratagem({"x": x.numpy(), "labels": y.numpy()})


def by_loader() -> dict[str, float]:
    """What transformers, Lightning and most loops do: torch's loader, a call and a copy for each sample."""
    data = TensorDataset(*columns())
    return timed(lambda size: iter(DataLoader(data, batch_size=size, shuffle=True)))


def by_index() -> dict[str, float]:
    """A permutation, and ``tensor[indices]``."""
    x, y = columns()

    def epoch(size: int) -> Iterator[Any]:
        order = torch.randperm(ROWS)
        for start in range(0, ROWS, size):
            indices = order[start : start + size]
            yield x[indices], y[indices]

    return timed(epoch)


CONTESTANTS = {
    "stratagem: TensorDataset": tensor_dataset,
    "stratagem: a mapping of arrays": mapping,
    "torch's DataLoader": by_loader,
    LIMIT: by_index,
}
