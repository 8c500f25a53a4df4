"""An order that puts samples of about the same length together, so that less of a batch is padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from torch import Tensor

from .orders import Order, Positions

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

    def order(self, order: Order, group_size: int, is_drawn: bool) -> "GroupedOrder":
        """Return an order with each of its groups sorted, and the longest of all samples first.

        Args:
            order: an order of single samples.
            group_size: how many samples are sorted together.
            is_drawn: whether ``order`` was drawn, so that asking it for everything costs little more.
        """
        lengths = self.lengths()
        if is_drawn:  # of several samples that are the longest, the one that comes first
            indices = order(numpy.arange(len(lengths)))
            longest = indices[numpy.argmax(lengths[indices])]
        else:
            longest = numpy.argmax(lengths)
        return GroupedOrder(order, lengths, group_size, int(longest))


class GroupedOrder:
    """An order in which each group of samples is sorted, the longest sample first. The longest of all samples comes
    first, so that a batch that is too large for the memory comes at once. A group is sorted when it is asked for.

    Args:
        order: the order of single samples.
        lengths: of all samples.
        group_size: how many samples are sorted together.
        longest: the index of the longest sample. It changes places with the one that would have come first.
    """

    def __init__(self, order: Order, lengths: Positions, group_size: int, longest: int) -> None:
        self.single, self.lengths, self.group_size, self.longest = order, lengths, group_size, longest
        self.first = int(self.sorted_group(0)[0])
        self._last: tuple[int, Positions] | None = None  # a batch takes a part of a group, and the next one goes on

    def __call__(self, positions: Positions) -> Positions:
        """Return the indices at some positions."""
        found, numbers = numpy.empty_like(positions), positions // self.group_size
        for number in numpy.unique(numbers):
            inside = numbers == number
            found[inside] = self.group(int(number))[positions[inside] - number * self.group_size]
        return found

    def group(self, number: int) -> Positions:
        """The indices of a group, with the longest of all and the first one in each other's place."""
        if self._last is None or self._last[0] != number:
            indices = self.sorted_group(number)
            longest, first = indices == self.longest, indices == self.first
            indices[longest], indices[first] = self.first, self.longest
            self._last = number, indices
        return self._last[1]

    def sorted_group(self, number: int) -> Positions:
        """The indices of a group, the longest sample first."""
        begin = number * self.group_size
        indices = self.single(numpy.arange(begin, min(begin + self.group_size, len(self.lengths))))
        return indices[numpy.argsort(-self.lengths[indices], kind="stable")]


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
