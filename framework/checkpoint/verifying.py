"""Comparison of a checkpoint with its manifest, before anything in the checkpoint is used."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .directory import MANIFEST, CheckpointError, hash_open, hash_text, read_header
from .schema import check_listing, read_manifest

SHARD = re.compile(r"/shard-(\d+)-")  # in the name of a file, the rank that wrote it


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare a checkpoint with its manifest, and the manifest with what a checkpoint must have.

    Args:
        path: the checkpoint.
        part, parts: read only this part of so many of the files, so that ranks share the work.

    Raises:
        CheckpointError: the message says what is missing, altered or not listed, or that it isn't a checkpoint.
    """
    if not path.exists():
        raise CheckpointError(f"{path} doesn't exist.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is a directory such as output/checkpoint-500.")
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a checkpoint of stratagem, or was never finished.")
    manifest = read_manifest(path)
    # The logs aren't among them: whatever became of them keeps no run from going on, see log_history.py.
    files = manifest["files"]
    # Every rank reads state.json below, so every rank compares it first.
    for name in dict.fromkeys(
        [*(name for name in ("state.json",) if name in files), *names_of_part(files, part, parts)]
    ):
        file, expected = path / name, files[name]
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        compare(file, expected)
    check_listing(path, manifest)


def names_of_part(files: Iterable[str], part: int, parts: int) -> list[str]:
    """Return which files one of several ranks reads: where as many ranks saved, its own shards, which it is about to
    load and finds in its host's memory then; else every so many of them.
    """
    listed = [(name, int(shard.group(1)) - 1 if (shard := SHARD.search(name)) else None) for name in files]
    if len({rank for _, rank in listed if rank is not None}) < parts:
        return [name for name, _ in listed[part::parts]]
    places = [(name, place if rank is None else rank) for place, (name, rank) in enumerate(listed)]
    return [name for name, place in places if place % parts == part]


def compare(file: Path, expected: Mapping[str, Any]) -> None:
    """Compare a file with its entry in the manifest. It is opened and read once.

    Raises:
        CheckpointError: the message says in what they differ.
    """
    with file.open("rb") as opened:
        size = file.stat().st_size
        found = hash_open(opened) if size == expected["bytes"] else {"bytes": size, "sha256": None}
        if found["bytes"] != expected["bytes"] or found["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"{file} was altered: it has {found['bytes']} bytes, SHA-256 {found['sha256']}; "
                f"the manifest says {expected['bytes']} bytes, {expected['sha256']}."
            )
        if "header" in expected:
            opened.seek(0)
            try:
                header = hash_text(read_header(opened)[0])
            except ValueError as error:
                raise CheckpointError(f"{file} was altered: {error}.") from error
            if header != expected["header"]:
                raise CheckpointError(
                    f"{file} was altered: its header isn't the one that the manifest has the hash of."
                )
