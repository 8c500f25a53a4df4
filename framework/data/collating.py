"""How samples become a batch: torch's default collation, with tuples that stay tuples."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import default_collate, default_convert

from ...strategies.batches import Pinnable

Collate = Callable[[Any], Any]
"""Samples to a batch."""


def collate(samples: list[Any]) -> Any:
    """torch's ``default_collate``; of samples that are tuples (or lists) of columns, the batch is a tuple."""
    return columns(default_collate(samples))


def convert(batch: Any) -> Any:
    """torch's ``default_convert``, for data that brings whole batches; of a tuple it leaves a tuple."""
    converted = default_convert(batch)
    return tuple(converted) if type(batch) is tuple else converted


def columns(batch: Any) -> Any:
    """What ``default_collate`` made: a list of columns as a tuple, and anything else as it is.

    Of tuples and lists it makes a list of columns; texts it leaves in a list of samples. A column of texts is a list
    or a tuple itself.
    """
    is_list = type(batch) is list and bool(batch)
    return tuple(batch) if is_list and not isinstance(batch[0], str | bytes) else batch


def with_tuples(collate_fn: Collate) -> Collate:
    """The collation in whose batches tuples stay tuples, where torch chose it; a user's own as it is."""
    if collate_fn is default_collate:
        return collate
    return convert if collate_fn is default_convert else collate_fn


class CollatePinnable:
    """Collates by a function, into a batch that the DataLoader can pin, whatever its class.

    Args:
        collate_fn: samples to a batch.
    """

    def __init__(self, collate_fn: Collate) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> Any:
        """The batch, for a loader that pins: it takes the wrapping off."""
        return Pinnable(self.collate_fn(samples))
