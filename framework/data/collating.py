"""Collation of samples into a batch: torch's default, but tuples stay tuples."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch.utils.data import DataLoader, default_collate, default_convert

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


def collation_of(loader: DataLoader[Any], collator: Collate | None) -> Collate:
    """Return how the batches of a ready loader are made: by ``data_collator``, where there is one, else its own way.

    Raises:
        ValueError: there is one, and the loader has a way of its own.
    """
    if collator is None:
        return with_tuples(loader.collate_fn)
    if loader.collate_fn is default_collate:
        return collator
    its = "hands on what its dataset gives" if loader.collate_fn is default_convert else "has a collate_fn of its own"
    raise ValueError(
        f"data_collator={collator!r:.80} makes a batch of samples, and the DataLoader that Fit was given {its}. Leave "
        "data_collator out, or give Fit the dataset itself."
    )


def check_can_be_sent(collator: Collate, workers: int, context: Any) -> None:
    """Refuse a collator that worker processes can't be given. Those that are forked have it already.

    Args:
        collator: the user's.
        workers: how many there are.
        context: the ``multiprocessing_context`` of a loader: its name, itself, or None.

    Raises:
        TypeError: says why it can't be pickled.
    """
    method = context if isinstance(context, str) else context and context.get_start_method()
    method = method or multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if not workers or method == "fork":
        return
    try:
        ForkingPickler.dumps(collator)
    except Exception as error:  # whatever the parts of the user's object raise
        raise TypeError(
            f"data_collator={collator!r:.80} can't be sent to the worker processes that load data, which start by "
            f"{method!r}: {type(error).__name__}: {error}. Define the function, or the class, at the top of a module "
            "(no lambda), or set dataloader_num_workers=0."
        ) from error


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
