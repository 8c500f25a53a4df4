"""Named tensors on disk: torch.distributed.checkpoint plans and reshards, safetensors stores. No pickle is read."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from .directory import CheckpointError, flush
from .dtypes import DTYPES

SHARDING = "DCP_SHARDING_INFO"  # the entry in the header of a file that says where its pieces lie in the whole tensors
FILE_BYTES = 1 << 30  # safetensors builds a file in memory, and this bounds the memory that a save takes


@dataclass(frozen=True)
class Stored:
    """The shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write tensors; each rank writes the shards that it owns. Collective.

    Args:
        directory: a folder that exists.
        tensors: name to tensor; the same names in the same order on every rank.
        group: the process group to use, where this isn't called in the thread that trains.
    """
    writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    with _plainly(directory):
        dcp.save(_apart(tensors), storage_writer=writer, process_group=group)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: contiguous (the weights of a convolution may be channels_last), and
    no two in the same memory (8-bit optimizers share one table among all parameters).
    """
    found, places = {}, set()
    for name, tensor in tensors.items():
        found[name] = tensor.contiguous()
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():
            place = tensor.data_ptr(), tensor.nbytes
            if place in places:
                found[name] = tensor.clone(memory_format=torch.contiguous_format)
            places.add(place)
    return found


def load_tensors(directory: Path, into: Mapping[str, Tensor], *, even_none: bool = False) -> None:
    """Read tensors in place, however they were sharded when they were written; each rank reads its shards. Collective.

    Args:
        directory: the folder that holds the tensors.
        into: name to tensor. Where it is empty, nothing is done.
        even_none: take part in the collectives although ``into`` is empty on this rank.
    """
    if not (into or even_none):
        return
    with _plainly(directory):
        dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(directory)))


@contextmanager
def _plainly(directory: Path) -> Iterator[None]:
    """Entered around a call of torch.distributed.checkpoint: a failure is said in one line, and warnings are hidden."""
    try:
        with warnings.catch_warnings():
            # Without a process group there is one process, as DCP says that it assumes.
            warnings.filterwarnings("ignore", message=".*torch.distributed is.*unavailable or uninitialized.*")
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch 2.9 uses it itself
            yield
    except CheckpointException as error:  # it isn't an Exception, and no handler would catch it
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, Exception):  # some rank was interrupted
            raise cause from None
        raise CheckpointError(f"{directory}: rank {rank}: {type(cause).__name__}: {cause}") from cause


def rank_files(directory: Path, rank: int) -> list[Path]:
    """Flush the files that a rank wrote with ``save_tensors``, and return their paths."""
    files = sorted(directory.glob(f"shard-{rank + 1:05d}-*.safetensors"))
    for file in files:
        flush(file)
    return files


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Return what a directory holds: name to whole shape and dtype. Only the headers of files are read.

    Raises:
        CheckpointError: a file is no safetensors file, or the pieces of a tensor overlap, leave a hole (which would be
            read as whatever is in memory) or differ in dtype.
    """
    pieces: dict[str, list[Piece]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, piece in _pieces(file):
            pieces.setdefault(name, []).append(piece)
    return {name: _joined(name, held) for name, held in pieces.items()}


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor in a file: where the piece begins and ends in the whole tensor."""

    file: Path
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of entries in the piece."""
        return math.prod(e - b for b, e in zip(self.begin, self.end, strict=True))

    def overlaps(self, other: "Piece") -> bool:
        """Return whether an entry of the whole tensor is in both pieces."""
        pairs = zip(self.begin, self.end, other.begin, other.end, strict=True)
        return all(max(b, begin) < min(e, end) for b, e, begin, end in pairs)


def _pieces(file: Path) -> Iterator[tuple[str, Piece]]:
    """Read from the header of a file which pieces of tensors are in it.

    Raises:
        CheckpointError: the message names the file, and the tensor.
    """
    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get(SHARDING)
            heads = [(name, content.get_slice(name)) for name in content.keys()]  # noqa: SIM118 (not a dict)
            shapes = {name: (tuple(head.get_shape()), head.get_dtype()) for name, head in heads}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    try:
        sharding = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} was altered: its {SHARDING} isn't JSON: {error}") from error
    for name, (shape, kind) in shapes.items():
        if kind not in DTYPES:
            raise CheckpointError(f"{file} was altered: {name} has the dtype {kind}, which no checkpoint has.")
        begin: Any = [0] * len(shape)
        if sharding is not None:
            entry = sharding.get(name) if isinstance(sharding, dict) else None
            begin = entry.get("saved_offsets") if isinstance(entry, dict) else None
        known = isinstance(begin, list) and all(type(offset) is int and 0 <= offset < 2**62 for offset in begin)
        if not known or len(begin) != len(shape):
            raise CheckpointError(f"{file} was altered: {name} of {shape} begins at {begin!r:.60} in its {SHARDING}.")
        yield name, Piece(file, tuple(begin), tuple(b + n for b, n in zip(begin, shape, strict=True)), DTYPES[kind])


def _joined(name: str, pieces: list[Piece]) -> Stored:
    """Return the shape and dtype of the whole tensor that pieces make.

    Raises:
        CheckpointError: the pieces don't make one tensor.
    """
    first = pieces[0]
    for piece in pieces:
        if piece.dtype != first.dtype or len(piece.begin) != len(first.begin):
            raise CheckpointError(f"{piece.file} was altered: {name} isn't of one dtype and form with {first.file}.")
    shape = tuple(map(max, zip(*(piece.end for piece in pieces), strict=True)))
    filled = sorted((piece for piece in pieces if piece.numel), key=lambda piece: piece.begin)
    # Most tensors are cut along one dimension, where only neighbours can overlap.
    cut = [d for d in range(len(shape)) if len({(piece.begin[d], piece.end[d]) for piece in filled}) > 1]
    for number, piece in enumerate(filled):
        others = filled[number + 1 : number + 2] if len(cut) < 2 else filled[number + 1 :]
        overlapping = next((other for other in others if piece.overlaps(other)), None)
        if overlapping is not None:
            raise CheckpointError(f"{overlapping.file} was altered: it holds a part of {name} that {piece.file} holds.")
    held = sum(piece.numel for piece in filled)
    if held != math.prod(shape):
        raise CheckpointError(
            f"{first.file.parent} holds {held} of the {math.prod(shape)} numbers of {name} {shape}: pieces are missing."
        )
    return Stored(shape, first.dtype)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Choose a file for each tensor, so that no file is much larger than FILE_BYTES: tensor name to file number."""
    file, size, files = 1, 0, {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            file, size = file + 1, 0
        files[name] = file
        size += tensor.nbytes
    return files
