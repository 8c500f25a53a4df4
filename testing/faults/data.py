"""Data of which one rank has less than the others."""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset


def rank_here() -> int:
    """Return this process's rank; 0 where it is alone."""
    if "RANK" in os.environ:  # a data set may be asked for its length before the ranks have met
        return int(os.environ["RANK"])
    return dist.get_rank() if dist.is_initialized() else 0


class UnevenData(Dataset[Any]):
    """A data set that can be indexed, of which one rank sees fewer samples.

    Args:
        data: it has ``__getitem__`` and ``__len__``.
        rank: that sees fewer.
        missing: samples at the end that it doesn't see.

    Example:
        >>> len(UnevenData(range(10), rank=0, missing=3)), len(UnevenData(range(10), rank=1, missing=3))
        (7, 10)
    """

    def __init__(self, data: Any, rank: int = 1, missing: int = 1) -> None:
        self.data, self.rank, self.missing = data, rank, missing

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __len__(self) -> int:
        return max(0, len(self.data) - (self.missing if rank_here() == self.rank else 0))


class UnevenStream(IterableDataset[Any]):
    """A data set that can only be iterated over, which ends earlier on one rank.

    Args:
        data: what is iterated over, anew in each epoch.
        rank: on which it ends earlier.
        samples: after which it ends there.

    Example:
        >>> list(UnevenStream(range(10), rank=0, samples=3))
        [0, 1, 2]
    """

    def __init__(self, data: Iterable[Any], rank: int = 1, samples: int = 1) -> None:
        self.data, self.rank, self.samples = data, rank, samples

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.data, self.samples if rank_here() == self.rank else None)
