"""Safetensors files written in a stream: a header, then each tensor's own memory, hashed by a thread meanwhile.

What is read of a tensor is written and hashed in pieces of about a megabyte, from the memory that it lies in. Only what
can't be written from there (tensors of a GPU, or with strides) passes through a few buffers of that size.
"""

import ctypes
import hashlib
import json
import math
import os
import queue
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .directory import CheckpointError
from .dtypes import DTYPES

PIECE = 1 << 20  # bytes that are written and hashed at a time
SMALL = 1 << 16  # tensors below are joined before they are written
AHEAD = 4  # pieces that may wait to be hashed

NAMES = {dtype: name for name, dtype in DTYPES.items()}

Form = tuple[str, tuple[int, ...]]  # a dtype by its name in safetensors, and a shape


@dataclass(frozen=True)
class Written:
    """A file as it was written.

    Attributes:
        bytes: its size.
        sha256: of all its bytes.
        header: the text of its header.
    """

    bytes: int
    sha256: str
    header: str


def form_of(tensor: Tensor) -> Form:
    """Return a tensor's dtype and shape as the header of a file has them."""
    return NAMES[tensor.dtype], tuple(tensor.shape)


def check_is_storable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that no safetensors file can hold.

    Raises:
        CheckpointError: the message says what it is.
    """
    if tensor.dtype not in NAMES or tensor.layout is not torch.strided:
        raise CheckpointError(
            f"{name} can't be saved: it is a tensor of {tensor.dtype}, {tensor.layout}, and a safetensors file holds "
            f"dense ones of {', '.join(str(dtype).removeprefix('torch.') for dtype in NAMES)}."
        )


class SafetensorsFile:
    """A safetensors file that is being written. Leave the context for it to be flushed to the disk.

    Args:
        path: the file, which is replaced where it is there.
        forms: tensor name to dtype and shape, in the order in which the tensors are added.
        metadata: of the file, text by name.

    Example:
        ::

            with SafetensorsFile(path, {"weight": ("F32", (2, 3))}, {"format": "pt"}) as file:
                file.add(torch.zeros(2, 3))
            print(file.written.sha256)
    """

    def __init__(self, path: Path, forms: Mapping[str, Form], metadata: Mapping[str, str]) -> None:
        self.path = path
        entries, place = {}, 0
        for name, (kind, shape) in forms.items():
            end = place + DTYPES[kind].itemsize * math.prod(shape)
            entries[name] = {"dtype": kind, "shape": shape, "data_offsets": (place, end)}
            place = end
        self.header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":"))
        self._expected = place
        self._size = 0
        self._digest = hashlib.sha256()
        self._waiting: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        self._small: list[bytes] = []
        self._small_bytes = 0
        self._buffers: list[Tensor] = []
        self._turn = 0

    def __enter__(self) -> "SafetensorsFile":
        """Open the file and write its header."""
        self._file = self.path.open("wb", buffering=0)
        self._thread = threading.Thread(target=self._hash, name="checkpoint-hash", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._file.close()
            raise
        text = self.header.encode()
        text += b" " * (-len(text) % 8)
        self._expected += 8 + len(text)
        self._small = [struct.pack("<Q", len(text)), text]
        self._small_bytes = 8 + len(text)
        return self

    def add(self, tensor: Tensor) -> None:
        """Write the next tensor, or the next bytes of one. It must stay as it is until the context is left."""
        if not tensor.numel():
            return
        if lies_in_a_row(tensor):
            self._add_memory(tensor)
        else:
            for chunk in chunks_of(tensor):
                self._add_memory(self._on_host(chunk))

    def _add_memory(self, tensor: Tensor) -> None:
        """Write what lies in a row in the memory of the host."""
        size = tensor.nbytes
        if size <= SMALL:
            self._small.append(ctypes.string_at(tensor.data_ptr(), size))
            self._small_bytes += size
            if self._small_bytes >= PIECE:
                self._write_small()
            return
        self._write_small()
        memory = memory_of(tensor)
        for begin in range(0, len(memory), PIECE):
            self._write(memory[begin : begin + PIECE], tensor)

    def _on_host(self, chunk: Tensor) -> Tensor:
        """Copy a chunk into the buffer whose turn it is. What was in there is hashed: beside the buffers that can wait
        there are one that is being hashed, and this one.
        """
        if not self._buffers:
            pinned = chunk.device.type == "cuda"
            self._buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned) for _ in range(AHEAD + 2)]
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn][: chunk.nbytes].view(chunk.dtype).view(chunk.shape)
        return buffer.copy_(chunk)

    def _write_small(self) -> None:
        if self._small:
            joined = b"".join(self._small)
            self._small, self._small_bytes = [], 0
            for begin in range(0, len(joined), PIECE):
                self._write(memoryview(joined)[begin : begin + PIECE], joined)

    def _write(self, piece: memoryview, owner: Any) -> None:
        self._waiting.put((piece, owner))  # which keeps the memory as long as it is hashed
        self._size += len(piece)
        while piece:
            piece = piece[self._file.write(piece) :]

    def _hash(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            self._digest.update(waiting[0])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until the file is on the disk, or close what could not be written."""
        try:
            if kind is None:
                self._write_small()
                assert self._size == self._expected, f"{self.path}: {self._size} bytes, not {self._expected}"
                os.fsync(self._file.fileno())
        finally:
            self._waiting.put(None)
            self._thread.join()
            self._file.close()

    @property
    def written(self) -> Written:
        """The file as it was written, once the context was left."""
        return Written(self._size, self._digest.hexdigest(), self.header)


def write_file(path: Path, forms: Mapping[str, Form], metadata: Mapping[str, str], data: Iterable[Tensor]) -> Written:
    """Write a safetensors file, and return what was written once it is on the disk.

    Raises:
        CheckpointError: the system refused; the message names the file.
    """
    try:
        with SafetensorsFile(path, forms, metadata) as file:
            for tensor in data:
                file.add(tensor)
    except OSError as error:  # the error of a full disk names no file
        raise CheckpointError(f"{path} can't be written: {error}") from error
    return file.written


def lies_in_a_row(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be read from the memory of the host, as they are and in their order."""
    is_plain = type(tensor) is Tensor and tensor.device.type == "cpu"
    return is_plain and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, which must be kept as long as this is used."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def chunks_of(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor into chunks of at most PIECE bytes, in the order of its numbers."""
    if tensor.nbytes <= PIECE:
        yield tensor
        return
    row = tensor.nbytes // tensor.shape[0]
    if row > PIECE:
        for number in range(tensor.shape[0]):
            yield from chunks_of(tensor[number])
    else:
        yield from tensor.split(PIECE // row)
