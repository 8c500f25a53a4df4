"""Checkpoint directories: there whole or not at all, listed with sizes and hashes, found again, and rotated."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT = 2  # of what is written; schema.py has what each holds
READ_FORMATS = (1, 2)
MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the name of a directory that is still being written, or removed
REPLACED = ".replaced"  # ends the name of a checkpoint while another of the same update takes its place
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
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
    if partial.exists():
        shutil.rmtree(partial)
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
    if final.exists():
        replaced = final.with_name(final.name + REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced)
    else:
        partial.rename(final)
    flush(final.parent)


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare a checkpoint with its manifest, and the manifest with what a checkpoint must have.

    Args:
        path: the checkpoint.
        part, parts: read only every ``parts``-th file, from ``part`` on, so that ranks share the work.

    Raises:
        CheckpointError: what is missing, altered, not listed or not a checkpoint.
    """
    from . import schema  # it imports this file

    if not path.exists():
        raise CheckpointError(f"{path} doesn't exist.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is a directory such as output/checkpoint-500.")
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a checkpoint of stratagem, or was never finished.")
    manifest = schema.read_manifest(path)
    for name, expected in list(manifest["files"].items())[part::parts]:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        found = {"bytes": file.stat().st_size} | (
            hash_file(file) if file.stat().st_size == expected["bytes"] else {"sha256": None}
        )
        if found != expected:
            raise CheckpointError(
                f"{file} was altered: it has {found['bytes']} bytes, SHA-256 {found['sha256']}; "
                f"the manifest says {expected['bytes']} bytes, {expected['sha256']}."
            )
    schema.check_listing(path, manifest)


def tidy(output_dir: Path) -> None:
    """Remove what a killed run left half-written, and give a checkpoint that it was about to replace its name back."""
    for path in sorted(output_dir.glob(f"checkpoint-*{REPLACED}")):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)
    for path in sorted(output_dir.glob(f"checkpoint-*{PARTIAL}")):
        shutil.rmtree(path)


def published(output_dir: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first; they may still be damaged."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in output_dir.iterdir() if (m := NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def rotate(output_dir: Path, limit: int | None, keep: Iterable[Path] = (), spare: Iterable[Path] = ()) -> list[Path]:
    """Remove the oldest checkpoints beyond ``limit``.

    Args:
        output_dir: holds them.
        limit: how many stay; None keeps all.
        keep: these stay whatever their age, and count towards the limit. The newest always stays.
        spare: these stay for now, and others aren't removed in their place.

    Returns:
        The removed ones.
    """
    checkpoints = published(output_dir)
    if limit is None or len(checkpoints) <= limit:
        return []
    protected = {*keep, checkpoints[-1]}
    removable = [path for path in checkpoints if path not in protected]
    spared = set(spare)
    removed = [path for path in removable[: len(checkpoints) - limit] if path not in spared]
    for path in removed:
        # Renamed first, so that a kill in the middle leaves no half checkpoint under a good name.
        doomed = partial_path(path)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
    return removed
