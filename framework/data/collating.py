"""Collation of samples into a batch: torch's default, but tuples stay tuples."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import default_collate, default_convert

from ...strategies.batches import Pinnable

Collate = Callable[[Any], Any]
"""A function of samples to a batch."""


def collate(samples: list[Any]) -> Any:
    """Collate by torch's ``default_collate``, but make a tuple of samples that are tuples (or lists) of columns."""
    return columns(default_collate(samples))


def convert(batch: Any) -> Any:
    """Convert a whole batch by torch's ``default_convert``, but make a tuple of a tuple."""
    converted = default_convert(batch)
    return tuple(converted) if type(batch) is tuple else converted


def columns(batch: Any) -> Any:
    """Make a tuple of a list of columns that ``default_collate`` has made, and leave anything else as it is.

    ``default_collate`` makes a list of columns of samples that are tuples or lists, and leaves texts in a list of
    samples. A column of texts is a list or a tuple itself.
    """
    is_list = type(batch) is list and bool(batch)
    return tuple(batch) if is_list and not isinstance(batch[0], str | bytes) else batch


def with_tuples(collate_fn: Collate) -> Collate:
    """Return a collation whose tuples stay tuples in the place of torch's default, and a user's own as it is."""
    if collate_fn is default_collate:
        return collate
    return convert if collate_fn is default_convert else collate_fn


class CollatePinnable:
    """Collates by a function, into a batch of any class that the DataLoader can pin.

    Args:
        collate_fn: a function of samples to a batch.
    """

    def __init__(self, collate_fn: Collate) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> Any:
        """Collate samples into a Pinnable, which a loader that pins replaces by the batch."""
        return Pinnable(self.collate_fn(samples))
