"""Checkpoint directories: there whole or not at all, listed with sizes and hashes, found again, and rotated."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 2  # of what is written; schema.py has what each holds
READ_FORMATS = (1, 2)
MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the name of a directory that is still being written, or removed
REPLACED = ".replaced"  # ends the name of a checkpoint while another of the same update takes its place
SET_ASIDE = ".set-aside"  # ends the name of a checkpoint of another run than the one that works in the directory
DAMAGED = ".damaged"  # ends the name of one that was found to be other than its manifest says
NAME = re.compile(r"checkpoint-(\d+)$")


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file and what is wrong with it."""


def hash_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk's names no file
        raise CheckpointError(f"{path} can't be written: {error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it isn't there, or isn't JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return final.with_name(final.name + PARTIAL)


def begin(final: Path) -> Path:
    """An empty directory beside ``final`` to write into; what a killed save left there is removed."""
    partial = partial_path(final)
    remove(partial)
    try:
        partial.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(f"Can't write checkpoints to {final.parent}: it is a file, or lies below one.") from error
    return partial


def publish(final: Path, files: dict[str, dict[str, Any]]) -> None:
    """Give a written checkpoint its name, in one step.

    Args:
        final: the name; what it holds now (the same step, saved before) is replaced.
        files: relative path to size and hash, for every file but the manifest. They are flushed.
    """
    partial = partial_path(final)
    write_text(partial / MANIFEST, json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}))
    for directory in {(partial / name).parent for name in files} | {partial}:
        flush(directory)
    if os.path.lexists(final):
        replaced = final.with_name(final.name + REPLACED)
        remove(replaced)
        final.rename(replaced)
        partial.rename(final)
        remove(replaced)
    else:
        partial.rename(final)
    flush(final.parent)


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, or a file. Of a link only the link goes; what it leads to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif os.path.lexists(path):
        shutil.rmtree(path)


def rename_aside(path: Path, ending: str) -> Path:
    """Give a checkpoint a name under which no run takes, counts or removes it: its own with ``ending``, and a number
    where that is taken.

    Returns:
        The new name.
    """
    aside, count = path.with_name(path.name + ending), 1
    while os.path.lexists(aside):
        count += 1
        aside = path.with_name(f"{path.name}{ending}-{count}")
    path.rename(aside)
    return aside


def leftovers(output_dir: Path, ending: str) -> list[Path]:
    """What lies in a directory under a checkpoint's name and an ending that a save or a rotation gives it."""
    if not output_dir.is_dir():
        return []
    found = (path for path in output_dir.iterdir() if path.name.endswith(ending))
    return sorted(path for path in found if NAME.match(path.name.removesuffix(ending)))


def tidy(output_dir: Path) -> None:
    """Remove what a killed run left half-written, and give a checkpoint that it was about to replace its name back.
    Only whoever holds the directory's lock may: others may be writing there.
    """
    for path in leftovers(output_dir, REPLACED):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if path.is_dir() and not os.path.lexists(final):
            path.rename(final)
        else:
            remove(path)
    for path in leftovers(output_dir, PARTIAL):
        remove(path)


def published(output_dir: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first, links to some among them; they may still be damaged."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in output_dir.iterdir() if (m := NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def rotate(
    checkpoints: Sequence[Path], limit: int | None, keep: Iterable[Path] = (), spare: Iterable[Path] = ()
) -> list[Path]:
    """Remove the oldest checkpoints beyond ``limit``.

    Args:
        checkpoints: of one run's line, oldest first.
        limit: how many stay; None keeps all.
        keep: these stay whatever their age, and count towards the limit.
        spare: these stay for now, and others aren't removed in their place.

    Returns:
        The removed ones.
    """
    if limit is None or len(checkpoints) <= limit:
        return []
    protected = set(keep)
    removable = [path for path in checkpoints if path not in protected]
    spared = set(spare)
    removed = [path for path in removable[: len(checkpoints) - limit] if path not in spared]
    for path in removed:
        # Renamed first, so that a kill in the middle leaves no half checkpoint under a good name.
        doomed = partial_path(path)
        remove(doomed)
        path.rename(doomed)
        remove(doomed)
    return removed


def check_can_write(output_dir: Path) -> None:
    """Write, flush and remove a small file where checkpoints are to be, or where their directory is to be made.

    Raises:
        ValueError: that fails; the message says why.
    """
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))  # a block: an empty file fits on a full disk
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"output_dir={str(output_dir)!r} can't be written to: {error.strerror} ({place}). Write another "
            "output_dir, or save_strategy='no' to save no checkpoint."
        ) from error
