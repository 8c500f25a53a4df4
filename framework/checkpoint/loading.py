"""Reading of stored tensors in place: a rank opens the files that hold something of its parts, each once."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..pretrained.reading_at import read_at
from .directory import CheckpointError
from .shards import Parts
from .streaming import lies_in_a_row, memory_of
from .tensors import Piece, Table

BUFFER = 1 << 23  # bytes that pass through memory of their own, where a tensor isn't read in place
SHORT = 1 << 16  # stretches of a file below are read together with what lies between them


@torch.no_grad()
def load_tensors(table: Table, folder: str, *intos: Mapping[str, Tensor]) -> None:
    """Read tensors in place, however they were sharded when they were written; each rank reads its parts. Not
    collective: another rank may fail where this one doesn't.

    Args:
        table: of the checkpoint.
        folder: that holds the tensors.
        *intos: name to tensor, whose dtype may be another than the stored one's.

    Raises:
        CheckpointError: a tensor isn't there, has another shape, or can't be read.
    """
    parts, wanted = Parts(), dict[Path, list[tuple[Piece, tuple[int, ...], Tensor]]]()
    stored = table.stored(folder)
    for name, whole in (item for into in intos for item in into.items()):
        if name not in stored or stored[name].shape != tuple(whole.shape):
            there = stored[name].shape if name in stored else "none of that name"
            raise CheckpointError(f"{table.path / folder}: {name} has {tuple(whole.shape)}; there is {there}.")
        part = parts.of(name, whole)
        target, begin = part.tensor, part.begin
        if not target.numel():
            continue
        end = tuple(b + n for b, n in zip(begin, target.shape, strict=True))
        for piece in table.pieces(folder, name):
            low = tuple(map(max, begin, piece.begin))
            high = tuple(map(min, end, piece.end))
            if all(b < e for b, e in zip(low, high, strict=True)):
                ranges = tuple(slice(b - own, e - own) for b, e, own in zip(low, high, begin, strict=True))
                box = tuple(b - own for b, own in zip(low, piece.begin, strict=True))
                wanted.setdefault(piece.file, []).append((piece, box, target[ranges]))
    for file, reads in wanted.items():
        try:
            with Reader(file) as reader:
                for piece, box, target in sorted(reads, key=lambda read: read[0].place):
                    reader.read(piece, box, target)
        except OSError as error:
            raise CheckpointError(f"{file} can't be read: {error}") from error


class Reader:
    """A file that pieces of tensors are read from.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffer: Tensor | None = None

    def __enter__(self) -> "Reader":
        """Open the file."""
        self._file = self.path.open("rb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def read(self, piece: Piece, begin: tuple[int, ...], into: Tensor) -> None:
        """Read a box out of a piece.

        Args:
            piece: in this file.
            begin: where the box begins in the piece.
            into: a tensor of the box's shape.
        """
        self._read(piece.place, piece.shape, piece.dtype, begin, into)
        if not into.is_inference():
            torch.autograd.graph.increment_version(into)

    def _read(
        self, place: int, shape: tuple[int, ...], dtype: torch.dtype, begin: tuple[int, ...], into: Tensor
    ) -> None:
        """Read a box out of an array of that shape that lies at that place."""
        if not shape:
            self._read_row(place, dtype, into)
            return
        row = math.prod(shape[1:]) * dtype.itemsize
        if tuple(into.shape[1:]) == shape[1:]:  # one stretch of the file
            self._read_row(place + begin[0] * row, dtype, into)
        elif row > BUFFER or into[0].numel() * dtype.itemsize >= SHORT:
            for number in range(into.shape[0]):
                self._read(place + (begin[0] + number) * row, shape[1:], dtype, begin[1:], into[number])
        else:
            box = tuple(slice(b, b + n) for b, n in zip(begin[1:], into.shape[1:], strict=True))
            for first in range(0, into.shape[0], BUFFER // row):
                rows = into[first : first + BUFFER // row]
                held = self._buffered(place + (begin[0] + first) * row, rows.shape[0] * row, into)
                rows.copy_(held.view(dtype).view(rows.shape[0], *shape[1:])[(slice(None), *box)])

    def _read_row(self, place: int, dtype: torch.dtype, into: Tensor) -> None:
        """Read all of a tensor from one stretch of the file."""
        if into.dtype == dtype and lies_in_a_row(into):
            self._fill(memory_of(into), place)
        elif into.numel() * dtype.itemsize <= BUFFER:
            into.copy_(self._buffered(place, into.numel() * dtype.itemsize, into).view(dtype).view(into.shape))
        else:
            row = into.numel() // into.shape[0]
            count = max(1, BUFFER // (row * dtype.itemsize))
            for first in range(0, into.shape[0], count):
                rows = into[first : first + count] if row * dtype.itemsize <= BUFFER else into[first]
                self._read_row(place + first * row * dtype.itemsize, dtype, rows)

    def _buffered(self, place: int, size: int, into: Tensor) -> Tensor:
        """Read bytes into the buffer, from which they go on to a tensor."""
        if self._buffer is None:
            self._buffer = torch.empty(BUFFER, dtype=torch.uint8, pin_memory=into.device.type == "cuda")
        self._fill(memory_of(self._buffer[:size]), place)
        return self._buffer[:size]

    def _fill(self, memory: memoryview, place: int) -> None:
        while memory:
            count = read_at(self._file, memory, place)
            if not count:
                raise CheckpointError(f"{self.path} was altered: it ends at {place}, in the middle of a tensor.")
            memory, place = memory[count:], place + count
