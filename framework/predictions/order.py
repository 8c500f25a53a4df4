"""The order of the data, in rows that several ranks have written.

A global micro-batch is cut in the order of ranks, so batch 0 of rank 0 comes first, then batch 0 of rank 1; a rank that
has no rows left in the last one has a batch less.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby


def in_order(batches: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield (part, rows) of each batch in the order of the data.

    Args:
        batches: for each part, in the order of ranks, the rows of its batches.

    Example:
        >>> list(in_order([[2, 2], [2, 1], [2]]))
        [(0, 2), (1, 2), (2, 2), (0, 2), (1, 1)]
    """
    for index in range(max(map(len, batches), default=0)):
        for part, sizes in enumerate(batches):
            if index < len(sizes):
                yield part, sizes[index]


def run_lengths(sizes: Sequence[int]) -> list[list[int]]:
    """Return sizes as [size, how many of them] each: all batches but the last are equal."""
    return [[size, len(list(alike))] for size, alike in groupby(sizes)]


def from_run_lengths(runs: Sequence[Sequence[int]]) -> list[int]:
    """Return the sizes that ``run_lengths`` was given."""
    return [size for size, count in runs for _ in range(count)]
