"""Outputs of all ranks, brought to the main process or to every rank: their rows as they lie in memory, not pickled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...strategies.base import Strategy
from .rows import in_one_piece

PIECE = 1 << 28  # bytes that are sent at once


@dataclass(frozen=True)
class Sent:
    """A tensor in the outputs of a rank, in the place where it is once it has come.

    Attributes:
        block: of the rank.
        begin: bytes of the block before it.
        shape: of the tensor.
    """

    block: int
    begin: int
    shape: tuple[int, ...]


class Blocks:
    """The tensors of one rank, by dtype: those of a path in the outputs are one block, where they lie in one piece.

    Args:
        batches: the outputs of its batches, on the host.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self.tensors: list[list[Tensor]] = []
        self._places: dict[tuple[Any, ...], int] = {}
        self._used: list[int] = []
        self.batches = [self._without_tensors(batch, ()) for batch in batches]
        self.forms = [(used, tensors[0].dtype) for used, tensors in zip(self._used, self.tensors, strict=True)]

    def _without_tensors(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            block = self._places.setdefault((*path, value.dtype), len(self.tensors))
            if block == len(self.tensors):
                self.tensors.append([])
                self._used.append(0)
            self.tensors[block].append(value)
            begin = self._used[block]
            self._used[block] += value.nbytes
            return Sent(block, begin, tuple(value.shape))
        if isinstance(value, dict):
            return {name: self._without_tensors(entry, (*path, name)) for name, entry in value.items()}
        if isinstance(value, tuple):
            return tuple(self._without_tensors(entry, (*path, place)) for place, entry in enumerate(value))
        return value

    def bytes_of(self, block: int) -> Tensor:
        """A block as bytes."""
        rows = self.tensors[block]
        whole = in_one_piece(rows) if rows[0].ndim else None
        whole = torch.cat([row.contiguous().reshape(-1) for row in rows]) if whole is None else whole
        return whole.reshape(-1).view(torch.uint8)


def exchange(strategy: Strategy, batches: Sequence[Any], to_all: bool) -> list[list[Any]] | None:
    """Bring every rank's outputs together. Collective. Of the ranks that hold one layer together the first one speaks.

    Args:
        strategy: set up.
        batches: the outputs of this rank's batches, on the host: tensors, and mappings and tuples of them; whatever
            else is in them is sent as an object.
        to_all: to every rank; else to the main process.

    Returns:
        Each rank's batches, in the order of ranks; None where they aren't brought.
    """
    step = strategy.tensor_parallel_size
    if strategy.world_size == 1:
        return [list(batches)]
    speaks = strategy.rank % step == 0
    blocks = Blocks(batches if speaks else ())
    everyones = strategy.gather((blocks.batches, blocks.forms))[::step]
    hears = to_all or strategy.is_main
    found = []
    for source, (theirs, forms) in zip(range(0, strategy.world_size, step), everyones, strict=True):
        is_mine, held = source == strategy.rank, []
        for block, (size, dtype) in enumerate(forms):
            sends = is_mine and (to_all or not strategy.is_main)
            data = blocks.bytes_of(block) if is_mine else torch.empty(size if hears else 0, dtype=torch.uint8)
            for begin in range(0, size, PIECE):
                if to_all or hears or sends:
                    strategy.copy_from(data[begin : begin + PIECE], source, to_all)
            held.append(data.view(dtype) if hears else data)
        if hears:
            found.append(list(batches) if is_mine else [with_tensors(batch, held) for batch in theirs])
    return found if hears else None


def with_tensors(value: Any, blocks: Sequence[Tensor]) -> Any:
    """Put the tensors that have come in their places."""
    if isinstance(value, Sent):
        block = blocks[value.block]
        begin = value.begin // block.element_size()
        return block[begin : begin + torch.Size(value.shape).numel()].view(value.shape)
    if isinstance(value, dict):
        return {name: with_tensors(entry, blocks) for name, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(with_tensors(entry, blocks) for entry in value)
    return value
