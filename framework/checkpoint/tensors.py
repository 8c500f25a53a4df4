"""The tensors in a checkpoint: where their pieces lie, by the headers of its files. No pickle is read.

``tensors.json`` holds a copy of every header, so that a checkpoint of many files is known by reading one. A copy counts
where the manifest has the header's hash, which is compared with the file itself when the checkpoint is verified; of
other files (of earlier versions, or changed since) the headers are read, each once.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from ...strategies.base import Strategy
from .directory import TABLE, CheckpointError, hash_text, read_header, read_json
from .dtypes import DTYPES
from .schema import read_manifest

SHARDING = "DCP_SHARDING_INFO"  # the entry in the header of a file that says where its pieces lie in the whole tensors
ENDING = ".safetensors"


@dataclass(frozen=True)
class Stored:
    """The shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Piece(NamedTuple):
    """A piece of a tensor in a file.

    Attributes:
        file: the path of the file.
        place: where the piece begins in the file, in bytes.
        begin, end: where it begins and ends in the whole tensor.
        dtype: of its numbers.
    """

    file: Path
    place: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the piece."""
        return tuple(e - b for b, e in zip(self.begin, self.end, strict=True))

    @property
    def numel(self) -> int:
        """The number of entries in the piece."""
        return math.prod(self.shape)

    def overlaps(self, other: "Piece") -> bool:
        """Return whether an entry of the whole tensor is in both pieces."""
        pairs = zip(self.begin, self.end, other.begin, other.end, strict=True)
        return all(max(b, begin) < min(e, end) for b, e, begin, end in pairs)


class Header(NamedTuple):
    """The header of a file.

    Attributes:
        text: as JSON, without the blanks at its end.
        data: where the tensors begin in the file, in bytes.
        bytes: of the whole file.
    """

    text: str
    data: int
    bytes: int


class Table:
    """The tensors of a checkpoint.

    Args:
        path: the checkpoint.
        headers: of its files, by their names in the checkpoint.

    Raises:
        CheckpointError: what the headers say can't be.
    """

    def __init__(self, path: Path, headers: Mapping[str, Header]) -> None:
        self.path = path
        self._pieces: dict[str, dict[str, list[Piece]]] = {}
        for file, header in headers.items():
            folder = self._pieces.setdefault(file.rpartition("/")[0], {})
            for name, piece in pieces_in(path / file, header):
                folder.setdefault(name, []).append(piece)
        self._stored = {
            folder: {name: joined(name, pieces) for name, pieces in held.items()}
            for folder, held in self._pieces.items()
        }

    def stored(self, folder: str) -> dict[str, Stored]:
        """Return what a folder holds: name to whole shape and dtype."""
        return self._stored.get(folder, {})

    def pieces(self, folder: str, name: str) -> Sequence[Piece]:
        """Return the pieces of a stored tensor, which make the whole of it."""
        return self._pieces[folder][name]


def read_table(path: Path) -> Table:
    """Read which tensors a checkpoint holds; see ``share_table``."""
    return Table(path, read_headers(path))


def share_table(strategy: Strategy, path: Path) -> Table:
    """Read on rank 0 which tensors a checkpoint holds, and tell all ranks. Collective.

    Raises:
        CheckpointError: on every rank: a file is no safetensors file, or the pieces of a tensor overlap, leave a hole
            (which would be read as whatever is in memory) or differ in dtype.
    """
    told: tuple[dict[str, Header], str | None] = {}, None
    if strategy.is_main:
        try:
            told = read_headers(path), None
        except Exception as error:
            told = {}, str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    headers, failure = strategy.broadcast(told)
    if failure is not None:
        raise CheckpointError(failure)
    return Table(path, headers)


def read_headers(path: Path) -> dict[str, Header]:
    """Read the headers of a checkpoint's safetensors files, from ``tensors.json`` as far as it has them.

    Raises:
        CheckpointError: a file can't be read, or isn't what the manifest lists.
    """
    files = {name: entry for name, entry in read_manifest(path)["files"].items() if name.endswith(ENDING)}
    copies = read_json(path / TABLE) if any("header" in entry for entry in files.values()) else {}
    if not isinstance(copies, dict):
        raise CheckpointError(f"{path / TABLE} was altered: it isn't a mapping of files to headers.")
    headers = {}
    for name, entry in files.items():
        text = json.dumps(copies[name], separators=(",", ":")) if name in copies else None
        if text is not None and hash_text(text) == entry.get("header"):
            headers[name] = Header(text, 8 + len(text) + -len(text) % 8, entry["bytes"])
        else:
            try:
                with (path / name).open("rb") as file:
                    headers[name] = Header(*read_header(file), os.fstat(file.fileno()).st_size)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path / name} can't be read: {error}") from error
    return headers


def pieces_in(file: Path, header: Header) -> Iterator[tuple[str, Piece]]:
    """Find in the header of a file which pieces of tensors are in it.

    Raises:
        CheckpointError: the message names the file, and the tensor.
    """
    entries = as_mapping(file, header.text, "its header")
    metadata = entries.pop("__metadata__", None)
    text = metadata.get(SHARDING) if isinstance(metadata, dict) else None
    sharding = None if text is None else as_mapping(file, text, f"its {SHARDING}")
    forms = {name: form_in(file, name, entry) for name, entry in entries.items()}
    end = 0
    for first, last, name in sorted((first, last, name) for name, (_, _, first, last) in forms.items()):
        if first != end:
            raise CheckpointError(f"{file} was altered: {name} begins at {first}, and what is before it ends at {end}.")
        end = last
    if header.data + end != header.bytes:
        told = header.data + end
        raise CheckpointError(f"{file} was altered: it has {header.bytes} bytes, and its header tells of {told}.")
    for name, (dtype, shape, place, _) in forms.items():
        begin: Any = [0] * len(shape)
        if sharding is not None:
            found = sharding.get(name)
            begin = found.get("saved_offsets") if isinstance(found, dict) else None
        if not are_counts(begin) or len(begin) != len(shape):
            raise CheckpointError(f"{file} was altered: {name} of {shape} begins at {begin!r:.60} in its {SHARDING}.")
        ends = tuple(b + n for b, n in zip(begin, shape, strict=True))
        yield name, Piece(file, header.data + place, tuple(begin), ends, dtype)


def form_in(file: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Return the dtype and shape of a tensor in the header of a file, and where it begins and ends among the tensors.

    Raises:
        CheckpointError: it can't be a tensor's.
    """
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{file} was altered: {name} has the dtype {kind!r:.60}, which no checkpoint has.")
    dtype = DTYPES[kind]
    if are_counts(shape) and are_counts(place) and len(place) == 2:
        first, last = place
        if last - first == math.prod(shape) * dtype.itemsize:
            return dtype, shape, first, last
    raise CheckpointError(f"{file} was altered: {name}, {kind} {shape!r:.60}, can't lie at {place!r:.60}.")


def as_mapping(file: Path, text: Any, what: str) -> dict[str, Any]:
    """Parse JSON that must be a mapping.

    Raises:
        CheckpointError: it isn't.
    """
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} was altered: {what} isn't JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} was altered: {what} isn't a mapping.")
    return found


def are_counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of numbers that sizes and places can be."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**62 for number in value)


def joined(name: str, pieces: list[Piece]) -> Stored:
    """Return the shape and dtype of the whole tensor that pieces make.

    Raises:
        CheckpointError: the pieces don't make one tensor.
    """
    first = pieces[0]
    if len(pieces) == 1 and not any(first.begin):
        return Stored(first.end, first.dtype)
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
