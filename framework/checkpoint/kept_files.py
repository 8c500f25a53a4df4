"""Files of frozen tensors, which the first checkpoint of a run has, and each later one by a hard link.

So every checkpoint is whole: it is copied, compared with its manifest and removed like any other. What a link is made
of must hold the same numbers still: a fingerprint is taken at each save, and what has changed (a teacher that follows
its student) is written anew. Where there can be no link, the file is written anew, too.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...strategies.duplicates import fingerprints
from .sharing import TensorFile

Entry = dict[str, Any]
"""Of a file in a manifest."""


@dataclass(frozen=True)
class Kept:
    """A file that this rank has written.

    Attributes:
        file: where it is.
        identity: what the file system knows it by: device, number, size, time of the last change.
        content: what says that tensors are those in it.
        entry: in the manifest.
        header: its text.
    """

    file: Path
    identity: tuple[int, ...]
    content: tuple[Any, ...]
    entry: Entry
    header: str


class KeptFiles:
    """The files of frozen tensors that this rank has written in one run. The thread that trains asks what is kept; one
    thread at a time links and notes.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._contents: dict[str, tuple[Any, ...]] = {}  # of the files in the save under way

    def divide(self, files: Iterable[TensorFile]) -> tuple[list[TensorFile], list[TensorFile]]:
        """Divide files into those to write, and those that are kept already, with the tensors that they have now."""
        divided: tuple[list[TensorFile], list[TensorFile]] = [], []
        for file in files:
            self._contents[file.name] = content = content_of(file)
            kept = self._kept.get(file.name)
            divided[kept is not None and kept.content == content].append(file)
        return divided

    def link(self, partial: Path, name: str) -> tuple[Entry, str] | None:
        """Give a kept file a name in a checkpoint that is being written.

        Returns:
            Its entry in the manifest, and its header; None where that can't be, and it is to be written.
        """
        kept = self._kept[name]
        try:
            os.link(kept.file, partial / name)
        except OSError:  # the checkpoint is gone, or the filesystem has no hard links
            return None
        if identity_of(partial / name) == kept.identity:
            return kept.entry, kept.header
        (partial / name).unlink()  # somebody has changed the file
        return None

    def note(self, final: Path, names: Sequence[str], entries: Mapping[str, Entry], headers: Mapping[str, str]) -> None:
        """Note where files are kept from here on: in a checkpoint that has been published.

        Args:
            final: the checkpoint.
            names: of all files of frozen tensors of this rank.
            entries, headers: of these files, and others.
        """
        self._kept = {
            name: Kept(final / name, identity_of(final / name), self._contents[name], entries[name], headers[name])
            for name in names
        }


def content_of(file: TensorFile) -> tuple[Any, ...]:
    """What says that two files hold the same numbers in the same places. Waits for the device, once."""
    return tuple(file.forms.items()), tuple(file.begins.items()), tuple(fingerprints(file.data))


def identity_of(path: Path) -> tuple[int, ...]:
    """What the file system knows a file by, whatever names it has."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
