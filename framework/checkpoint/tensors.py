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

SHARDING = "DCP_SHARDING_INFO"  # the entry of a file's header that says where its pieces lie in the whole tensors
FILE_BYTES = 1 << 30  # safetensors builds a file's bytes in memory: this bounds what a save needs beyond the state


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of a tensor in a directory."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write tensors, sharded ones by the ranks that own the shards. Collective: every rank calls it.

    Args:
        directory: exists already.
        tensors: name to tensor; the same names in the same order on every rank.
        group: the ranks' group to use, in another thread than training's.
    """
    writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    with _plainly(directory):
        dcp.save(_apart(tensors), storage_writer=writer, process_group=group)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous (a convolution's weights may be channels_last), and no two in
    one place of memory (the tables of 8-bit optimizers are one for all parameters).
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
    """Read tensors in place, each rank its shards, whatever the sharding was when they were written. Collective.

    Args:
        directory: holds them.
        into: name to tensor. With none, nothing is done.
        even_none: this rank takes part although it reads none.
    """
    if not (into or even_none):
        return
    with _plainly(directory):
        dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(directory)))


@contextmanager
def _plainly(directory: Path) -> Iterator[None]:
    """Around a call of torch.distributed.checkpoint: its failure as one line, and no warnings."""
    try:
        with warnings.catch_warnings():
            # DCP says that it assumes one process; without a process group that is so.
            warnings.filterwarnings("ignore", message=".*torch.distributed is.*unavailable or uninitialized.*")
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch 2.9 uses it itself
            yield
    except CheckpointException as error:  # no Exception: it would pass every handler on the way out
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, Exception):  # an interrupt, on whichever rank
            raise cause from None
        raise CheckpointError(f"{directory}: rank {rank}: {type(cause).__name__}: {cause}") from cause


def rank_files(directory: Path, rank: int) -> list[Path]:
    """The files that a rank wrote with ``save_tensors``, flushed."""
    files = sorted(directory.glob(f"shard-{rank + 1:05d}-*.safetensors"))
    for file in files:
        flush(file)
    return files


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """What a directory holds: name to whole shape and dtype. Reads headers only.

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
    """A part of a tensor in a file: where it begins and ends in the whole."""

    file: Path
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(e - b for b, e in zip(self.begin, self.end, strict=True))

    def overlaps(self, other: "Piece") -> bool:
        """Whether both hold the same number of the whole."""
        pairs = zip(self.begin, self.end, other.begin, other.end, strict=True)
        return all(max(b, begin) < min(e, end) for b, e, begin, end in pairs)


def _pieces(file: Path) -> Iterator[tuple[str, Piece]]:
    """What a file's header says that it holds.

    Raises:
        CheckpointError: names the file, and the tensor.
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
    """A tensor from its pieces.

    Raises:
        CheckpointError: they aren't one.
    """
    first = pieces[0]
    for piece in pieces:
        if piece.dtype != first.dtype or len(piece.begin) != len(first.begin):
            raise CheckpointError(f"{piece.file} was altered: {name} isn't of one dtype and form with {first.file}.")
    shape = tuple(map(max, zip(*(piece.end for piece in pieces), strict=True)))
    filled = sorted((piece for piece in pieces if piece.numel), key=lambda piece: piece.begin)
    # Along one dimension, as most are cut, an overlap is one of neighbours.
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
    """Tensor name to file number, so that no file is much larger than FILE_BYTES."""
    file, size, files = 1, 0, {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            file, size = file + 1, 0
        files[name] = file
        size += tensor.nbytes
    return files
