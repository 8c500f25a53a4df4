"""Tensors in safetensors files: where each lies, and how a part of it is read.

Files are read and not mapped into memory: mapped pages count as this process' memory while a layer is filled, and on
network file systems each page is a request of its own.
"""

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from .reading_at import read_at

Part = tuple[slice, ...]
"""A slice for each dimension of a whole tensor."""

LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
SHORT_RUN = 4096  # bytes in a row of a file below which the rows are read whole: a disk reads a page at least
OWN_MEMORY = 1 << 20  # bytes from which a tensor that passes is mapped
BLOCK = 8 << 20  # bytes of whole rows that are in memory at a time


class Reader:
    """Reads bytes of files, and keeps the last file open, as neighbours are read one after another."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: FileIO | None = None

    def read(self, path: Path, begin: int, into: Tensor) -> None:
        """Fill a contiguous tensor of bytes.

        Raises:
            ValueError: the file ends before.
        """
        if self._path != path:
            self._path, self._file = path, FileIO(path)
        assert self._file is not None
        view, done = into.numpy().data, 0
        while done < len(view):
            count = read_at(self._file, view[done:], begin + done)
            if not count:
                raise ValueError(f"{path} ends at byte {begin + done}, where its header says that there is more.")
            done += count


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: what the file calls it.
        begin: where its first byte is in the file.
    """

    reader: Reader
    path: Path
    name: str
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, part: Part) -> Tensor:
        """Read a part, in the file's dtype."""
        bounds = [each.indices(size)[:2] for each, size in zip(part, self.shape, strict=True)]
        sizes = [end - begin for begin, end in bounds]
        whole = passing(math.prod(sizes) * self.dtype.itemsize)
        if len(whole):
            self._read_runs(bounds, sizes, whole)
        return whole.view(self.dtype).reshape(sizes)

    def _read_runs(self, bounds: list[tuple[int, int]], sizes: list[int], whole: Tensor) -> None:
        """Read what lies in a row of the file at once: all dimensions from the last one that is cut."""
        cut = [d for d, size in enumerate(sizes) if size != self.shape[d]]
        last = cut[-1] if cut else 0
        strides = [self.dtype.itemsize * math.prod(self.shape[d + 1 :]) for d in range(len(sizes))]
        run = sizes[last] * strides[last] if sizes else len(whole)
        if last and run < SHORT_RUN:
            self._read_rows(bounds, sizes, whole, last, strides)
            return
        offset = self.begin + (bounds[last][0] * strides[last] if sizes else 0)
        for number, begins in enumerate(product(*(range(*bounds[d]) for d in range(last)))):
            begin = offset + sum(index * stride for index, stride in zip(begins, strides, strict=False))
            self.reader.read(self.path, begin, whole[number * run : (number + 1) * run])

    def _read_rows(
        self, bounds: list[tuple[int, int]], sizes: list[int], whole: Tensor, last: int, strides: list[int]
    ) -> None:
        """Read rows along the dimension before the last cut one whole, and keep the part of each."""
        row, columns = strides[last - 1], slice(*(bound * strides[last] for bound in bounds[last]))
        kept = whole.view(-1, sizes[last - 1], columns.stop - columns.start)
        most = max(1, BLOCK // row)
        first, end = bounds[last - 1]
        for number, begins in enumerate(product(*(range(*bounds[d]) for d in range(last - 1)))):
            outer = self.begin + sum(index * stride for index, stride in zip(begins, strides, strict=False))
            for begin in range(first, end, most):
                count = min(most, end - begin)
                block = passing(count * row)
                self.reader.read(self.path, outer + begin * row, block)
                kept[number, begin - first : begin - first + count] = block.view(count, row)[:, columns]


def passing(count: int) -> Tensor:
    """Make a tensor of bytes that won't be kept. A large one has memory of its own, which goes back to the system at
    once: among parameters, which stay, malloc would keep the holes.
    """
    if count < OWN_MEMORY:
        return torch.empty(count, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


def read_header(path: Path, reader: Reader) -> Iterator[StoredTensor]:
    """Find the tensors in a file; their numbers aren't read.

    Raises:
        ValueError: it is no safetensors file, or was altered.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path} is no safetensors file: it has {size} bytes.")
    length = torch.empty(8, dtype=torch.uint8)
    reader.read(path, 0, length)
    count = int.from_bytes(length.numpy().tobytes(), "little")
    if count > min(LARGEST_HEADER, size - 8):
        raise ValueError(f"{path} is no safetensors file: its header would have {count} of its {size} bytes.")
    text = torch.empty(count, dtype=torch.uint8)
    reader.read(path, 8, text)
    try:
        header = json.loads(text.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: its header isn't JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is a {type(header).__name__}.")
    for name, entry in header.items():
        if name != "__metadata__":
            yield stored_tensor(reader, path, name, entry, 8 + count, size)


def stored_tensor(reader: Reader, path: Path, name: str, entry: object, first: int, size: int) -> StoredTensor:
    """Understand one entry of a header.

    Args:
        first: where the numbers of the file's tensors begin.
        size: of the file.

    Raises:
        ValueError: it makes no sense.
    """
    problem = f"{path} can't be read: its header says of {name!r}: {entry!r:.200}"
    shape, offsets = (
        sizes_in(entry.get(key)) if isinstance(entry, dict) else None for key in ("shape", "data_offsets")
    )
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(problem)
    dtype = DTYPES.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
    if dtype is None:
        raise ValueError(f"{problem}. Numbers of that dtype aren't read.")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or first + end > size:
        raise ValueError(f"{problem}. The file has {size} bytes, of which {first} come before the numbers.")
    return StoredTensor(reader, path, name, first + begin, shape, dtype)


def sizes_in(value: object) -> tuple[int, ...] | None:
    """The whole numbers from 0 in a list; None where it is something else."""
    known = isinstance(value, list) and all(type(number) is int and 0 <= number < 2**62 for number in value)
    return tuple(value) if known and isinstance(value, list) else None
