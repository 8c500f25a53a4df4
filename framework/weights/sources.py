"""Where a stored tensor comes from: memory that a file is mapped to, or pieces that were written by several ranks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..pretrained.stored import Part


class Source(Protocol):
    """A stored tensor, any part of which can be read."""

    @property
    def name(self) -> str:
        """What the file calls it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""

    def read(self, part: Part) -> Tensor:
        """Read a part, in its dtype."""


@dataclass(frozen=True)
class StoredWeights:
    """What a file or a directory holds of a model.

    Attributes:
        path: of the file or the directory.
        format: "safetensors", "torch", "lightning", "dcp", "transformers" or "checkpoint".
        tensors: by name; of names that share a tensor, the first alone.
        tied: further names to the first one.
        left_out: names of what is there and isn't a weight, such as an optimizer's state.
        frozen: names of weights that a checkpoint of ours was saved without.
    """

    path: Path
    format: str
    tensors: Mapping[str, Source]
    tied: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mapped:
    """A tensor whose memory is a file's, or that is in memory already."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self.tensor.dtype

    def read(self, part: Part) -> Tensor:
        """Return a view of a part."""
        return self.tensor[part]


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies in boxes, each with the place in the whole where it begins. The boxes fill the whole."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[tuple[tuple[int, ...], Source], ...]

    def read(self, part: Part) -> Tensor:
        """Read what the part meets of each box."""
        bounds = [each.indices(size)[:2] for each, size in zip(part, self.shape, strict=True)]
        met = list(self._meeting(bounds))
        if len(met) == 1:
            return met[0][2].read(met[0][1])  # no other box has anything of the part
        whole = torch.empty([max(0, end - begin) for begin, end in bounds], dtype=self.dtype)
        for place, box, source in met:
            whole[place] = source.read(box)
        return whole

    def _meeting(self, bounds: list[tuple[int, int]]) -> Iterator[tuple[Part, Part, Source]]:
        """Yield, for each box that the part meets, the common place in the part and in the box."""
        for begin, source in self.boxes:
            low = [max(b, first) for b, (first, _) in zip(begin, bounds, strict=True)]
            ends = zip(begin, source.shape, bounds, strict=True)
            high = [min(b + size, end) for b, size, (_, end) in ends]
            if all(one < other for one, other in zip(low, high, strict=True)):
                firsts = [first for first, _ in bounds]
                yield between(low, high, firsts), between(low, high, begin), source


def between(low: list[int], high: list[int], origin: list[int] | tuple[int, ...]) -> Part:
    """The slices from ``low`` to ``high``, seen from ``origin``."""
    return tuple(slice(b - o, e - o) for b, e, o in zip(low, high, origin, strict=True))


def everything(source: Source) -> Part:
    """The part that is all of a source."""
    return tuple(slice(0, size) for size in source.shape)


def some(names: list[str] | tuple[str, ...], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
