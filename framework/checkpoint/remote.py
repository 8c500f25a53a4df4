"""Copies of checkpoints at a URL. A copy is whole or no checkpoint at all, as a local one is."""

import json
import os
from pathlib import Path
from typing import Any

from . import directory
from .directory import HISTORY, MANIFEST, CheckpointError
from .schema import check_manifest
from .verifying import verify


def open_filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """Open the filesystem of a URL with fsspec, and return it with the path in it. Nothing is read yet.

    Args:
        url: "s3://bucket/runs/7", "file:///mnt/runs", ...
        **options: options of the filesystem, such as ``endpoint_url``.

    Raises:
        ValueError: no filesystem goes by that name, or its package isn't installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(
            f"{url!r} needs the package fsspec, which isn't installed ({error}). Run: pip install 'stratagem[upload]'"
        ) from error
    try:
        filesystem, path = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url!r} can't be opened: {error}. It must begin with a protocol that fsspec knows: file://, s3://, "
            "gs://, hf://, ..."
        ) from error
    return filesystem, path.rstrip("/")


def upload(checkpoint: Path, filesystem: Any, folder: str) -> None:
    """Copy a published checkpoint to ``<folder>/<its name>``, the manifest last, so that a copy with a manifest is
    whole. Files of an earlier copy that this checkpoint doesn't have are removed. A copy that is there already isn't
    made again.

    Args:
        checkpoint: the checkpoint, which stays as it is.
        filesystem: see ``open_filesystem``.
        folder: a path in the filesystem.

    Raises:
        CheckpointError: the checkpoint was replaced meanwhile, or the copy of a file came out shorter.
        Exception: the error of the filesystem.
    """
    target, manifest = f"{folder}/{checkpoint.name}", (checkpoint / MANIFEST).read_bytes()
    if filesystem.exists(f"{target}/{MANIFEST}"):
        if filesystem.cat_file(f"{target}/{MANIFEST}") == manifest:
            return
        filesystem.rm_file(f"{target}/{MANIFEST}")  # the manifest goes before the first of its files is replaced
    files = check_manifest(json.loads(manifest), checkpoint / MANIFEST)["files"]
    if filesystem.exists(target):
        root = filesystem._strip_protocol(target).rstrip("/")
        for found in filesystem.find(target):
            if found.removeprefix(root).lstrip("/") not in {*files, HISTORY}:
                filesystem.rm_file(found)
    for parent in sorted({str(Path(name).parent) for name in files}):
        filesystem.makedirs(target if parent == "." else f"{target}/{parent}", exist_ok=True)
    for name, entry in files.items():
        filesystem.put_file(str(checkpoint / name), f"{target}/{name}")
        size = filesystem.info(f"{target}/{name}")["size"]
        if size != entry["bytes"]:
            raise CheckpointError(f"{target}/{name} has {size} bytes after the upload instead of {entry['bytes']}")
    if (checkpoint / HISTORY).exists():  # it grows: what a later save appends isn't this checkpoint's
        filesystem.put_file(str(checkpoint / HISTORY), f"{target}/{HISTORY}")
    if (checkpoint / MANIFEST).read_bytes() != manifest:
        raise CheckpointError(f"{checkpoint} was replaced while it was uploaded")
    filesystem.pipe_file(f"{target}/{MANIFEST}{directory.PARTIAL}", manifest)
    filesystem.mv(f"{target}/{MANIFEST}{directory.PARTIAL}", f"{target}/{MANIFEST}")


def download(url: str, output_dir: Path) -> Path:
    """Copy a checkpoint from a URL into ``output_dir``, under its own name, unless it is there already.

    Args:
        url: it ends in ``checkpoint-<update>``.
        output_dir: the folder, which is made where it is missing.

    Returns:
        The path of the copy, which is whole.

    Raises:
        CheckpointError: there is no whole checkpoint at the URL, or another one has its name in ``output_dir``.
    """
    try:
        filesystem, source = open_filesystem(url)
        manifest = filesystem.cat_file(f"{source}/{MANIFEST}")
        files = check_manifest(json.loads(manifest), f"{source}/{MANIFEST}")["files"]
        final = output_dir / source.rpartition("/")[2]
        if not directory.NAME.match(final.name):
            raise CheckpointError("its name must be checkpoint-<update>")
        if os.path.lexists(final):
            if (final / MANIFEST).exists() and (final / MANIFEST).read_bytes() == manifest:
                return final
            raise CheckpointError(f"{final} is another one; move it away, or resume from it")
        partial = directory.begin(final)
        try:
            for name in files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(f"{source}/{name}", str(partial / name))
                directory.flush(partial / name)
            if filesystem.exists(f"{source}/{HISTORY}"):
                filesystem.get_file(f"{source}/{HISTORY}", str(partial / HISTORY))
                directory.flush(partial / HISTORY)
            (partial / MANIFEST).write_bytes(manifest)
            verify(partial)
            directory.publish(final, files)
        except BaseException:
            directory.remove(partial)
            raise
    except Exception as error:
        raise CheckpointError(f"{url} can't be resumed from: {error or repr(error)}") from error
    return final
