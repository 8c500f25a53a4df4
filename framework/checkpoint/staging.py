"""One copy of what a rank saves, in memory of the host that is used again for the next save."""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .sharing import TensorFile
from .streaming import chunks_of, lies_in_a_row

BLOCK = 1 << 26  # bytes; pinned memory comes in powers of two, which would nearly double tensors of any other size
ALIGNED = 16  # bytes; blocks and the files in them begin at multiples, and so tensors at multiples of their dtype


class HostCopies:
    """Copies the files to write, as bytes, into blocks of memory, which stay for the next copies."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @torch.no_grad()
    def copy(self, files: Sequence[TensorFile]) -> list[TensorFile]:
        """Return the files with their bytes in blocks; training may change the tensors from here on. What was copied
        before is overwritten.
        """
        devices = {tensor.device.type for file in files for tensor in file.data}
        self._rest = sum(tensor.nbytes for file in files for tensor in file.data) + ALIGNED * len(files)
        self._pinned = "cuda" in devices
        self._number = self._place = 0
        copied = [replace(file, data=[*self._pack(file.data)]) for file in files]
        if devices - {"cpu"}:
            torch.accelerator.synchronize()
        return copied

    def _pack(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Copy tensors end to end, and yield the stretches of blocks that they fill."""
        self._place += -self._place % ALIGNED
        begin = self._place
        for flat in (row for tensor in tensors for row in rows_of(tensor)):
            done = 0
            while done < flat.numel():
                if self._number == len(self._blocks):
                    self._blocks.append(self._new_block())
                block = self._blocks[self._number]
                count = min(flat.numel() - done, (block.numel() - self._place) // flat.itemsize)
                copy_bytes(flat[done : done + count], block[self._place : self._place + count * flat.itemsize])
                done += count
                self._place += count * flat.itemsize
                self._rest -= count * flat.itemsize
                if done < flat.numel():  # the block is full
                    yield block[begin : self._place]
                    self._number, self._place, begin = self._number + 1, 0, 0
        if self._place > begin:
            yield self._blocks[self._number][begin : self._place]

    def _new_block(self) -> Tensor:
        size = min(BLOCK, self._rest)
        return torch.empty(size + -size % ALIGNED, dtype=torch.uint8, pin_memory=self._pinned)


def rows_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in one dimension; of one with strides in many rows, so that no copy of it is made for that."""
    if tensor.is_contiguous():
        yield tensor.view(-1)
    else:
        yield from (chunk.reshape(-1) for chunk in chunks_of(tensor))


def copy_bytes(row: Tensor, into: Tensor) -> None:
    """Copy numbers in a row into bytes on the host, without waiting for the device where they come from one."""
    if lies_in_a_row(row):
        ctypes.memmove(into.data_ptr(), row.data_ptr(), row.nbytes)
    elif row.numel():
        into.view(row.dtype).copy_(row, non_blocking=True)
