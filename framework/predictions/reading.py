"""Reading a directory of predictions in the order of the data."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from torch import Tensor

from ..measures.outputs import concatenate
from .order import from_run_lengths, in_order

INDEX = "index.json"
VERSION = 1
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")]


class PartOfIndex(Struct):
    """What one rank has written: files with their rows, and its batches as [rows, how many such]."""

    files: list[tuple[FileName, Positive]]
    batches: list[tuple[Positive, Positive]]


class Index(Struct):
    """The content of index.json."""

    version: int
    rows: Count
    pad_index: int
    parts: list[PartOfIndex]


def read_index(directory: Path) -> Index:
    """Read and check the index of a directory of predictions.

    Raises:
        ValueError: names the file, and what is wrong with it.
    """
    path = directory / INDEX
    try:
        index = msgspec.json.decode(path.read_bytes(), type=Index)
    except OSError as error:
        raise ValueError(f"{directory} holds no predictions: {path} can't be read: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} was altered: {error}") from error
    if index.version != VERSION:
        raise ValueError(f"{path} has version {index.version}; this version of stratagem reads {VERSION}.")
    for part in index.parts:
        in_files, in_batches = sum(rows for _, rows in part.files), sum(rows * count for rows, count in part.batches)
        if in_files != in_batches:
            raise ValueError(f"{path} was altered: a part has {in_files} rows in files and {in_batches} in batches.")
    if index.rows != sum(rows for part in index.parts for _, rows in part.files):
        raise ValueError(f"{path} was altered: its parts haven't {index.rows} rows together.")
    return index


def iterate_predictions(directory: str | Path) -> Iterator[dict[str, Tensor]]:
    """Read predictions batch by batch, in the order of the data; no more than a batch is in memory.

    Args:
        directory: that ``fit.predict(data, output=directory)`` has written.

    Yields:
        Column to tensor: "predictions" or the names of a mapping's entries, and "label_ids" where there were labels.

    Raises:
        ValueError: the directory isn't whole; the message names the file.

    Example:
        ``total = sum(batch["predictions"].sum() for batch in iterate_predictions("predictions"))``
    """
    place = Path(directory).expanduser()
    index = read_index(place)
    streams = [rows_of_part(place, part) for part in index.parts]
    try:
        for stream in streams:
            next(stream)
        for number, rows in in_order([from_run_lengths(part.batches) for part in index.parts]):
            pieces = streams[number].send(rows)
            yield {name: concatenate([piece[name] for piece in pieces], index.pad_index) for name in pieces[0]}
    finally:
        for stream in streams:
            stream.close()


def rows_of_part(place: Path, part: PartOfIndex) -> Generator[list[dict[str, Tensor]], int, None]:
    """Make a generator that is sent numbers of rows, and gives the next ones of a part, from one file or several."""
    from safetensors import SafetensorError, safe_open

    pieces: list[dict[str, Tensor]] = []
    wanted = yield pieces
    for name, rows in part.files:
        position = 0
        try:
            with safe_open(place / name, "pt") as file:
                slices = {column: file.get_slice(column) for column in file.keys()}  # noqa: SIM118 (no mapping)
                for column, found in slices.items():
                    if not found.get_shape() or found.get_shape()[0] != rows:
                        raise ValueError(f"{place / name}: {column} hasn't {rows} rows, as {INDEX} says.")
                while position < rows:
                    taken = min(wanted, rows - position)
                    pieces.append({column: found[position : position + taken] for column, found in slices.items()})
                    position, wanted = position + taken, wanted - taken
                    if not wanted:
                        wanted, pieces = (yield pieces), []
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{place / name} can't be read: {error}") from error


def read_predictions(directory: str | Path) -> dict[str, Tensor]:
    """Read predictions whole, in the order of the data: what ``fit.predict(data)`` would have returned, by column.

    Args:
        directory: that ``fit.predict(data, output=directory)`` has written.

    Raises:
        ValueError: see ``iterate_predictions``.

    Example:
        ``read_predictions("predictions")["predictions"].argmax(-1)``
    """
    batches = list(iterate_predictions(directory))
    pad_index = read_index(Path(directory).expanduser()).pad_index
    return {name: concatenate([batch[name] for batch in batches], pad_index) for name in batches[0]} if batches else {}
