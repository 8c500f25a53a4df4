"""Where a parameter's values come from: a tensor in a file, or several that are put together, or a piece of one."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .stored import Part


class Source(Protocol):
    """Values of a whole parameter, any part of which can be read."""

    @property
    def name(self) -> str:
        """What is read, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""

    def read(self, part: Part) -> Tensor:
        """Read a part, in the dtype of the file."""


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape along a new first dimension, such as experts that a file holds one by one."""

    members: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The first tensor's name and the last's."""
        return f"{self.members[0].name} ... {self.members[-1].name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return len(self.members), *self.members[0].shape

    def read(self, part: Part) -> Tensor:
        """Read the members that the part meets."""
        taken = [member.read(part[1:]) for member in self.members[part[0]]]
        if taken:
            return torch.stack(taken)
        nothing = self.members[0].read((slice(0, 0),) * (len(part) - 1))  # a rank may hold nothing, in their dtype
        return nothing.new_empty([len(range(*p.indices(n))) for p, n in zip(part, self.shape, strict=True)])


@dataclass(frozen=True)
class Joined:
    """Tensors end to end along a dimension."""

    members: tuple[Source, ...]
    dimension: int

    @property
    def name(self) -> str:
        """The names of all."""
        return " and ".join(member.name for member in self.members)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        shape = list(self.members[0].shape)
        shape[self.dimension] = sum(member.shape[self.dimension] for member in self.members)
        return tuple(shape)

    def read(self, part: Part) -> Tensor:
        """Read what the part meets of each."""
        pieces: list[Tensor] = []
        d, begun = self.dimension, 0
        first, end, _ = part[d].indices(self.shape[d])
        for member in self.members:
            size = member.shape[d]
            own = slice(min(max(first - begun, 0), size), min(max(end - begun, 0), size))
            begun += size
            if own.start < own.stop or not pieces:
                pieces.append(member.read((*part[:d], own, *part[d + 1 :])))
        return torch.cat(pieces, dim=d)


@dataclass(frozen=True)
class Piece:
    """One of several equal pieces of a tensor along a dimension, such as the queries of a fused projection."""

    fused: Source
    dimension: int
    number: int
    count: int

    @property
    def name(self) -> str:
        """The whole tensor's name, and which piece."""
        return f"{self.fused.name} (piece {self.number + 1} of {self.count})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the piece; torch.chunk leaves the rest to the last one."""
        shape = list(self.fused.shape)
        whole = shape[self.dimension]
        size = -(-whole // self.count)
        shape[self.dimension] = max(0, min(size, whole - self.number * size))
        return tuple(shape)

    def read(self, part: Part) -> Tensor:
        """Read a part of the piece."""
        d = self.dimension
        first, end, _ = part[d].indices(self.shape[d])
        begin = self.number * -(-self.fused.shape[d] // self.count)
        return self.fused.read((*part[:d], slice(begin + first, begin + end), *part[d + 1 :]))
