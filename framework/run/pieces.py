"""Pieces of a micro-batch: what forward takes cut along its samples, and what it returned for each joined again."""

import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...strategies.batches import field_names, map_batch, moves_itself, refilled, with_fields

WITHOUT_SAMPLES = (str, bytes, bool, int, float, complex, torch.dtype, type(None))
"""What every piece is given as it is, as it is given a tensor without dimensions."""


@dataclass(frozen=True)
class Piece:
    """Some samples of a micro-batch, as forward takes them.

    Attributes:
        args, kwargs: for forward.
        begin, end: the rows that they are of the micro-batch.
        counts: whether its outputs are part of the micro-batch's. A rank with fewer samples than pieces computes its
            first piece again, since the other ranks wait for it in as many forwards as they make.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    begin: int
    end: int
    counts: bool = True


def cut(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], number: int, fill: bool
) -> list[Piece]:
    """Cut the arguments of forward along their samples, into pieces whose sizes differ by one sample at most.

    Args:
        forward: the module's own, for the names of its arguments.
        args, kwargs: what it would be called with: tensors whose first dimension is the samples, lists of samples, and
            mappings, tuples and dataclasses of them. Numbers and texts are given to each piece as they are.
        number: of pieces.
        fill: have so many where there are fewer samples, too; see ``Piece.counts``.

    Raises:
        ValueError: an argument can't be cut; the message has its name.
    """
    positional = [
        parameter.name
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    names = [positional[i] if i < len(positional) else f"input {i}" for i in range(len(args))]
    rows = next((found for value in (*args, *kwargs.values()) if (found := samples_in(value)) is not None), None)
    if rows is None:
        raise ValueError(
            f"contrastive_chunks={number} cuts what forward takes along its samples, and there is no tensor and no "
            f"list in {', '.join([*names, *kwargs])}. Leave contrastive_chunks out."
        )
    pieces = []
    for begin, end in bounds(rows, number):
        chosen = Cut(number, rows, begin, end)
        own = tuple(chosen.part(value, name) for name, value in zip(names, args, strict=True))
        pieces.append(Piece(own, {name: chosen.part(value, name) for name, value in kwargs.items()}, begin, end))
    if fill:
        first = pieces[0]
        again = Piece(first.args, first.kwargs, first.begin, first.end, counts=False)
        pieces += [again] * (number - len(pieces))
    return pieces


def bounds(rows: int, number: int) -> list[tuple[int, int]]:
    """Return where each piece begins and ends; none is empty, unless there are no rows.

    Example:
        >>> bounds(7, 3), bounds(2, 3)
        ([(0, 3), (3, 5), (5, 7)], [(0, 1), (1, 2)])
    """
    found, begin = [], 0
    for index in range(max(1, min(rows, number))):
        end = begin + rows // number + (index < rows % number)
        found.append((begin, end))
        begin = end
    return found


def samples_in(value: Any) -> int | None:
    """Count the samples in an argument: the rows of its first tensor, or the length of a list that comes before one."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, list):
        return len(value)
    if isinstance(value, Mapping):
        parts: Iterator[Any] = iter(value.values())
    elif isinstance(value, tuple) and not moves_itself(value):
        parts = iter(value)
    else:
        parts = (getattr(value, name) for name in field_names(value))
    return next((found for part in parts if (found := samples_in(part)) is not None), None)


@dataclass(frozen=True)
class Cut:
    """Takes the rows of one piece out of an argument of forward.

    Args:
        number: of pieces, for messages.
        rows: samples in the micro-batch.
        begin, end: of the piece.
    """

    number: int
    rows: int
    begin: int
    end: int

    def part(self, value: Any, name: str) -> Any:
        """Return the piece's part of a value, in containers of the same classes.

        Raises:
            ValueError: it can't be cut.
        """
        if isinstance(value, Tensor):
            if value.ndim and len(value) != self.rows:
                raise self.uncut(name, f"is a tensor of shape {tuple(value.shape)}")
            return value[self.begin : self.end] if value.ndim else value
        if isinstance(value, Mapping):
            parts = {key: self.part(entry, f"{name}[{key!r}]") for key, entry in value.items()}
            return refilled(value, parts) if isinstance(value, dict | UserDict) else parts
        if isinstance(value, WITHOUT_SAMPLES):
            return value
        if moves_itself(value):
            raise self.uncut(name, f"is a {type(value).__name__}, which nobody else looks into")
        if isinstance(value, tuple | list):
            if self.is_of_samples(value, name):
                return value[self.begin : self.end]
            entries = [self.part(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        if fields := field_names(value):
            return with_fields(value, {key: self.part(getattr(value, key), f"{name}.{key}") for key in fields})
        raise self.uncut(name, f"is a {type(value).__name__}")

    def is_of_samples(self, value: Sequence[Any], name: str) -> bool:
        """Whether a list, or a tuple without tensors, has an entry for each sample."""
        if len(value) != self.rows:
            return False
        each = [isinstance(entry, Tensor) and entry.ndim > 0 and len(entry) == self.rows for entry in value]
        if isinstance(value, list) and all(each) and self.rows > 1:
            raise self.uncut(name, f"is a list of {self.rows} tensors of {self.rows} rows, and could be cut either way")
        return isinstance(value, list) or not any(isinstance(entry, Tensor) for entry in value)

    def uncut(self, name: str, why: str) -> ValueError:
        """Make the error for an argument that can't be cut."""
        return ValueError(
            f"contrastive_chunks={self.number} cuts what forward takes along its {self.rows} samples, and {name} "
            f"{why}. Give forward tensors whose first dimension is the samples, or lists of samples; what isn't of the "
            "samples can be read in loss, or be an attribute of the module."
        )


def named_tensors(outputs: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors in what forward returned, in the order of ``map_batch``, with how each is reached; and objects
    that nobody looks into.
    """
    if isinstance(outputs, Tensor) or (moves_itself(outputs) and not isinstance(outputs, Mapping)):
        yield name, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(outputs, tuple | list):
        for index, value in enumerate(outputs):
            yield from named_tensors(value, f"{name}[{index}]")
    else:
        for field in field_names(outputs):
            yield from named_tensors(getattr(outputs, field), f"{name}.{field}")


class Joined:
    """What forward returns for a whole micro-batch, filled in piece by piece.

    Args:
        rows: samples in the micro-batch.
        number: of pieces, for messages.

    Attributes:
        tensors: with the rows of the micro-batch; there is no graph behind them.
    """

    def __init__(self, rows: int, number: int) -> None:
        self.rows, self.number = rows, number
        self.tensors: list[Tensor] = []
        self._containers: Any = None  # of the first piece, with nothing in them

    @torch.no_grad()
    def fill(self, piece: Piece, outputs: Any) -> None:
        """Copy what forward returned for a piece.

        Raises:
            ValueError: its rows aren't the piece's, or it has another shape than the piece before it.
        """
        named = list(named_tensors(outputs))
        for name, value in named:
            size = piece.end - piece.begin
            if not isinstance(value, Tensor) or not value.ndim or len(value) != size:
                shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
                raise ValueError(
                    f"contrastive_chunks={self.number} joins what forward returns for pieces of the samples, and for a "
                    f"piece of {size} outputs{name} is a {type(value).__name__} {shape}. Each tensor needs a row for "
                    "each sample; compute what is of the whole batch in loss (a parameter can be read there)."
                )
        if not self.tensors:
            self.tensors = [value.new_empty((self.rows, *value.shape[1:])) for _, value in named]
            self._containers = map_batch(lambda value: value.new_empty(0), outputs)
        shapes = [tuple(value.shape[1:]) for _, value in named]
        if shapes != [tuple(tensor.shape[1:]) for tensor in self.tensors]:
            raise ValueError(
                f"contrastive_chunks={self.number} joins what forward returns for pieces of the samples, and the rows "
                f"of one piece have the shapes {shapes}, those of another "
                f"{[tuple(tensor.shape[1:]) for tensor in self.tensors]}. Have forward return rows of one shape."
            )
        for whole, (_, value) in zip(self.tensors, named, strict=True):
            whole[piece.begin : piece.end].copy_(value)

    def outputs(self) -> Any:
        """Put the tensors into the containers in which forward returns them."""
        in_order = iter(self.tensors)
        return map_batch(lambda _: next(in_order), self._containers)
