"""The directories of checkpoints: written beside their names, published in one step, found again, and rotated."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 3  # the format that is written; schema.py describes the formats
READ_FORMATS = (1, 2, 3)
MANIFEST = "manifest.json"
TABLE = "tensors.json"  # the headers of all safetensors files
MAX_HEADER = 100_000_000  # bytes; safetensors reads none beyond
HISTORY = "log_history.jsonl"  # see log_history.py
PARTIAL = ".partial"  # ends the name of a directory that is still being written, or removed
REPLACED = ".replaced"  # ends the name of a checkpoint while another of the same update takes its place
SET_ASIDE = ".set-aside"  # ends the name of a checkpoint of another run than the one that works in the directory
DAMAGED = ".damaged"  # ends the name of a checkpoint that differs from its manifest
NAME = re.compile(r"checkpoint-(\d+)$")


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file and what is wrong with it."""


def hash_file(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file."""
    with path.open("rb") as file:
        return hash_open(file)


def hash_open(file: Any) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file that is open for reading, from its beginning."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_header(file: Any) -> tuple[str, int]:
    """Read the header of a safetensors file that is open, from its beginning: its text, and where the tensors begin.

    Raises:
        ValueError: the file doesn't begin with a header.
    """
    head = file.read(8)
    size = int.from_bytes(head, "little")
    content = file.read(size) if len(head) == 8 and size <= MAX_HEADER else b""
    if not content or len(content) != size:
        raise ValueError(f"it doesn't begin with the header of a safetensors file (of {size} bytes)")
    return content.decode().rstrip(" "), 8 + size


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows flushes no directory
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a file and flush it, and return its size in bytes and its SHA-256."""
    content = text.encode()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the error of a full disk names no file
        raise CheckpointError(f"{path} can't be written: {error}") from error
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, flushed: a reader sees the old one or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    write_text(partial, text)
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing, or isn't JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def partial_path(final: Path) -> Path:
    """Return the path where a checkpoint is written before it is published."""
    return final.with_name(final.name + PARTIAL)


def begin(final: Path) -> Path:
    """Make an empty directory beside ``final`` to write into, and remove what a killed save left there."""
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
        final: the name. A checkpoint of the same update that has it is replaced.
        files: relative path to size and hash, of every file but the manifest. The files are flushed already.
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
    """Remove a directory and everything in it, or a file, or a link, but not what the link leads to."""
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
    """Find what has the name of a checkpoint with an ending that a save or a rotation gives it."""
    if not output_dir.is_dir():
        return []
    found = (path for path in output_dir.iterdir() if path.name.endswith(ending))
    return sorted(path for path in found if NAME.match(path.name.removesuffix(ending)))


def tidy(output_dir: Path) -> None:
    """Remove what a killed run left half-written, and give back its name to a checkpoint that the run was replacing.
    Call it only with the lock of the directory: other processes may be writing there.
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
    """List the checkpoints in a directory, oldest first, links to checkpoints included. They may be damaged."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in output_dir.iterdir() if (m := NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def rotate(
    checkpoints: Sequence[Path], limit: int | None, keep: Iterable[Path] = (), spare: Iterable[Path] = ()
) -> list[Path]:
    """Remove the oldest checkpoints beyond ``limit``.

    Args:
        checkpoints: the checkpoints of one run's line, oldest first.
        limit: how many stay; None keeps all.
        keep: these stay whatever their age, and count towards the limit.
        spare: these stay for now, and no others are removed in their place.

    Returns:
        The checkpoints that were removed.
    """
    if limit is None or len(checkpoints) <= limit:
        return []
    protected = set(keep)
    removable = [path for path in checkpoints if path not in protected]
    spared = set(spare)
    removed = [path for path in removable[: len(checkpoints) - limit] if path not in spared]
    for path in removed:
        # The checkpoint is renamed first, so that a kill in the middle leaves no half checkpoint under a good name.
        doomed = partial_path(path)
        remove(doomed)
        path.rename(doomed)
        remove(doomed)
    return removed


def check_can_write(output_dir: Path) -> None:
    """Check that checkpoints can be written: write, flush and remove a small file where they, or their directory, will
    be.

    Raises:
        ValueError: the file can't be written; the message says why.
    """
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))  # one block, since an empty file fits on a full disk
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"output_dir={str(output_dir)!r} can't be written to: {error.strerror} ({place}). Write another "
            "output_dir, or save_strategy='no' to save no checkpoint."
        ) from error
