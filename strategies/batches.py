"""Batches of any shape: where their tensors are, and a batch of the same shape with other tensors in it.

A batch is a tensor, or tensors in mappings, tuples, lists, dataclasses and attrs classes, within each other as they may
be. An object of another class that has a method ``to`` (torch_geometric's Batch, a PackedSequence) is a batch, too: it
knows how it moves, and nobody else looks into it.
"""

import copy
import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

LABELS = "labels"
"""The entry, or the attribute, that holds a batch's targets."""


def map_batch(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with ``function`` of each tensor, and of each object that moves itself, in that one's place.

    Every container keeps its class, and the one that was given keeps its contents.

    Args:
        function: a tensor, or an object with a method ``to``, to what takes its place.
        batch: see above; what is neither a tensor nor a container stays as it is.

    Example:
        >>> map_batch(torch.Tensor.double, {"image": torch.zeros(1), "boxes": [torch.ones(2), torch.ones(3)]})
        {'image': tensor([0.], dtype=torch.float64), 'boxes': [tensor([1., 1.], dtype=torch.float64), ...]}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    kind = type(batch)
    if kind is dict:
        return {key: map_batch(function, value) for key, value in batch.items()}
    if isinstance(batch, dict | UserDict):  # a dict's own method ``to`` would leave nested tensors behind
        return refilled(batch, {key: map_batch(function, value) for key, value in batch.items()})
    if moves_itself(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_batch(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(map_batch(function, value) for value in batch))
    if isinstance(batch, tuple | list):
        return kind(map_batch(function, value) for value in batch)
    names = field_names(batch)
    if names:
        return with_fields(batch, {name: map_batch(function, getattr(batch, name)) for name in names})
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch in the order in which it holds them. Objects that move themselves keep theirs."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif moves_itself(batch):
        return
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value)
    else:
        for name in field_names(batch):
            yield from tensors_of(getattr(batch, name))


def labels_in(batch: Any) -> Any:
    """What a batch holds as "labels": a mapping's entry, any other object's attribute; None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get(LABELS)
    return None if isinstance(batch, Tensor | tuple | list) and not hasattr(batch, "_fields") else named_labels(batch)


def named_labels(batch: Any) -> Any:
    """An object's attribute ``labels``, where that is data and no method."""
    labels = getattr(batch, LABELS, None)
    return None if callable(labels) else labels


def is_by_position(batch: Any) -> bool:
    """Whether a batch is a tuple of entries. A PackedSequence is a tuple to Python, and one thing to everybody else."""
    return type(batch) is tuple or (isinstance(batch, tuple) and not moves_itself(batch))


def moves_itself(batch: Any) -> bool:
    """Whether an object that is no tensor has a method ``to`` of its own. A class, and a module, is no batch."""
    return not isinstance(batch, Tensor | torch.nn.Module | type) and callable(getattr(batch, "to", None))


@functools.cache
def fields_of_class(kind: type) -> tuple[str, ...]:
    """The names of the fields of a dataclass or an attrs class; none for any other."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return tuple(field.name for field in getattr(kind, "__attrs_attrs__", ()))


def field_names(batch: Any) -> tuple[str, ...]:
    """The fields of a dataclass's or attrs class's object that it has values for."""
    names = fields_of_class(batch.__class__)
    return tuple(name for name in names if hasattr(batch, name)) if names else names


def with_fields(batch: Any, values: Mapping[str, Any]) -> Any:
    """A copy with other values in its fields. Nothing is constructed: ``__post_init__`` made the fields from arguments
    that may be gone, and a frozen class forbids assignment only to its users.
    """
    changed = copy.copy(batch)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed


def refilled(batch: MutableMapping[Any, Any], values: Mapping[Any, Any]) -> MutableMapping[Any, Any]:
    """A copy of a mapping of the same class (a UserDict, an OrderedDict) with these values."""
    changed = copy.copy(batch)
    for key, value in values.items():
        changed[key] = value
    return changed


# Page-locked memory.


class Pinnable:
    """A batch that pins itself: torch's DataLoader, which knows mappings, tuples and lists, asks anything else for a
    method ``pin_memory``, and hands on what that returns.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def pin_memory(self) -> Any:
        """The batch itself, with its tensors in page-locked memory."""
        return map_batch(pinned, self.batch)


def pinned(value: Any) -> Any:
    """A tensor, or an object that can do so by itself, in page-locked memory."""
    pin = getattr(value, "pin_memory", None)
    return pin() if callable(pin) else value
