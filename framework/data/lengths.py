"""An order that puts samples of about the same length together, so that less of a batch is padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

UPDATES_IN_GROUP = 50
"""A group that is sorted holds the samples of so many updates, or a quarter of the data, whichever is less."""


class LengthGroups:
    """Makes orders in which neighbours are of about the same length.

    Args:
        data: a map-style dataset; see ``length_of``.
        column: the column of lengths; see ``length_column_name`` of FitArguments.
        update_samples: samples in an update over all ranks.

    Raises:
        ValueError: the lengths of the data can't be told.
    """

    def __init__(self, data: Any, column: str, update_samples: int) -> None:
        self.data, self.column = data, column
        self.group_size = max(1, min(len(data) // (update_samples * 4), UPDATES_IN_GROUP)) * update_samples
        self._lengths: numpy.ndarray[Any, Any] | None = None
        if known_lengths(data, column) is None:
            length_of(data[0], column)  # data without lengths is refused now, and not at the first epoch

    def lengths(self) -> "numpy.ndarray[Any, Any]":
        """The length of each sample, read from the data when it is first asked for."""
        if self._lengths is None:
            known = known_lengths(self.data, self.column)
            if known is None:
                known = [length_of(self.data[index], self.column) for index in range(len(self.data))]
            self._lengths = numpy.asarray(known, dtype=numpy.int64)
        return self._lengths

    def order(self, generator: torch.Generator, group_size: int) -> "numpy.ndarray[Any, Any]":
        """Draw the indices of an epoch at random, and sort each group of them, the longest sample first. The longest of
        all samples comes first, so that a batch that is too large for the memory comes at once.

        Args:
            generator: what draws.
            group_size: how many samples are sorted together.
        """
        lengths = self.lengths()
        drawn = torch.randperm(len(lengths), generator=generator).numpy()
        starts = range(0, len(drawn), group_size)
        groups = [drawn[start : start + group_size] for start in starts]
        ordered = numpy.concatenate([group[numpy.argsort(-lengths[group], kind="stable")] for group in groups])
        firsts = numpy.array(starts)
        longest = firsts[numpy.argmax(lengths[ordered[firsts]])]
        ordered[[0, longest]] = ordered[[longest, 0]]
        return ordered


def known_lengths(data: Any, column: str) -> Sequence[int] | None:
    """Return the lengths that the data has ready: an attribute of that name, or a column of ``datasets.Dataset``."""
    known = getattr(data, column, None)
    if known is None and column in getattr(data, "column_names", ()):
        known = data[column]
    return None if known is None or callable(known) else list(known)


def length_of(sample: Any, column: str) -> int:
    """Return the length of a sample: its entry of that name, else the length of its "input_ids".

    Raises:
        ValueError: the sample has neither.
    """
    if isinstance(sample, Mapping):
        if column in sample:
            length = sample[column]
            return int(length.item() if isinstance(length, Tensor) else length)
        if "input_ids" in sample:
            return len(sample["input_ids"])
    keys = f"the keys {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else type(sample).__name__
    raise ValueError(
        f"train_sampling_strategy='group_by_length' needs lengths, and a sample of train_data has {keys}. Give the "
        f"data an attribute {column!r} (the length of each sample), or its samples an entry {column!r} or "
        "'input_ids'. Another name is written as length_column_name."
    )
