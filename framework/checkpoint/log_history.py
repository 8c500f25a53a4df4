"""The logs of a run in a file that its checkpoints share: each of them says how much of it is its own.

``log_history.jsonl`` has one log a line. The first save of a session makes it, in the checkpoint; each later one links
it into the next checkpoint (another name of the same file) and appends what was logged since, so that a save takes no
longer after a million logs than after ten. A checkpoint's state.json says how many bytes of the file were there when it
was saved, and their SHA-256: what lies beyond them was logged later, and isn't the checkpoint's. So a checkpoint that
is copied or moved alone has all of its logs, and removing another one takes nothing from it.

No session appends to a file that another has made: that one's later checkpoints may need it, and so may a copy by links
elsewhere. It copies the beginning that is its own, once.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .directory import HISTORY, PARTIAL, CheckpointError

BLOCK = 1 << 20


@dataclass(frozen=True)
class Mark:
    """A beginning of the file.

    Attributes:
        entries: logs in it.
        bytes: its length.
        sha256: over these bytes.
    """

    entries: int = 0
    bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class LogHistory:
    """Keeps the file of one run, on its main process. Other ranks only read.

    One thread takes what was logged, and one at a time places it.
    """

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._file = SharedFile()
        self._digest = hashlib.sha256()
        self._taken = Mark()
        self._last: tuple[dict[str, Any], bytes] | None = None  # the last entry that was taken, and its line

    def go_on_from(self, found: "FoundHistory") -> None:
        """Begin with the logs of a checkpoint, where they are whole."""
        if found.mark is not None:
            self._file, self._digest, self._taken = SharedFile(found.file, found.mark), found.digest, found.mark
            self._last = (found.entries[-1], line_of(found.entries[-1])) if found.entries else None

    def take(self, entries: list[dict[str, Any]]) -> "HistoryPart":
        """Take what was logged since this was called last.

        Args:
            entries: all logs of the run so far. Where those that were taken aren't its beginning any more (someone has
                put another list in its place, or shortened it), all are taken anew.

        Returns:
            What a checkpoint of now holds. An entry that JSON can't hold is refused when it is placed, where all ranks
            hear of it.
        """
        count = self._taken.entries
        if count and not (len(entries) >= count and self._is_last(entries[count - 1])):
            self._begin_anew()
            count = 0
        failure: CheckpointError | None = None
        lines = []
        try:
            lines = [line_of(entry) for entry in entries[count:]]
        except (TypeError, ValueError) as error:
            failure = CheckpointError(f"state.log_history can't be saved: {error}. A log holds numbers and strings.")
        if lines:
            data = b"".join(lines)
            self._digest.update(data)
            self._taken = Mark(count + len(lines), self._taken.bytes + len(data), self._digest.hexdigest())
            self._last = entries[self._taken.entries - 1], lines[-1]
            self._file.unwritten.append((self._taken, data))
        return HistoryPart(self._file, self._taken, entries, failure)

    def _is_last(self, entry: dict[str, Any]) -> bool:
        return self._last is not None and entry is self._last[0] and line_of(entry) == self._last[1]


@dataclass(frozen=True)
class HistoryPart:
    """The logs that one checkpoint holds.

    Attributes:
        file: that they are in, or will be.
        mark: how much of it.
        entries: all logs of the run, of which these are the first.
        failure: why they can't be written.
    """

    file: "SharedFile"
    mark: Mark
    entries: list[dict[str, Any]]
    failure: CheckpointError | None = None

    def place(self, folder: Path) -> None:
        """Put the file into the folder of a checkpoint that is about to be published, flushed.

        Raises:
            CheckpointError: it can't be written.
        """
        if self.failure is not None:
            raise self.failure
        try:
            self.file.place(folder, self.mark, self.entries)
        except OSError as error:  # the error of a full disk names no file
            raise CheckpointError(f"{folder / HISTORY} can't be written: {error}") from error


class SharedFile:
    """The file of one session, which has a name in each of its checkpoints.

    Args:
        home: a name of a file that begins with what was written.
        written: how much of it that is.

    Attributes:
        unwritten: (mark after it, lines) of what is to be appended.
    """

    def __init__(self, home: Path | None = None, written: Mark = Mark()) -> None:
        self.home, self.written = home, written
        self.unwritten: deque[tuple[Mark, bytes]] = deque()
        self._own: tuple[int, int] | None = None  # device and number of the file that this session appends to

    def place(self, folder: Path, mark: Mark, entries: Sequence[dict[str, Any]]) -> None:
        """Give the file a name in a folder, and append to it up to a mark. See ``HistoryPart.place``."""
        name = folder / HISTORY
        if not (self._link(name) or self._copy(name)):
            self._write_anew(name, mark, entries)
        with name.open("r+b") as file:
            file.seek(self.written.bytes)  # beyond it may be what a save began to append that failed
            while self.unwritten and self.written.bytes < mark.bytes:
                after, data = self.unwritten[0]
                file.write(data)
                file.flush()
                self.written = after
                self.unwritten.popleft()
            os.fsync(file.fileno())
            status = os.fstat(file.fileno())
        self._own = status.st_dev, status.st_ino
        self.home = folder.with_name(folder.name.removesuffix(PARTIAL)) / HISTORY

    def _link(self, name: Path) -> bool:
        """Give this session's own file another name, where it still has one and the filesystem can."""
        if self._own is None or self.home is None:
            return False
        try:
            os.link(self.home, name)
        except OSError:
            return False
        status = name.stat()
        if (status.st_dev, status.st_ino) == self._own and status.st_size >= self.written.bytes:
            return True
        name.unlink()  # another file has come into its place
        return False

    def _copy(self, name: Path) -> bool:
        """Copy what was written to a file of its own, where it is still there."""
        if self.home is None:
            return self.written.bytes == 0 and name.write_bytes(b"") == 0
        digest, rest = hashlib.sha256(), self.written.bytes
        try:
            source = self.home.open("rb")
        except OSError:
            return False
        with source, name.open("wb") as file:
            while rest and (block := source.read(min(rest, BLOCK))):
                digest.update(block)
                file.write(block)
                rest -= len(block)
        return digest.hexdigest() == self.written.sha256

    def _write_anew(self, name: Path, mark: Mark, entries: Sequence[dict[str, Any]]) -> None:
        """Write all logs up to a mark from memory: the file has gone with the checkpoints that held it."""
        with name.open("wb") as file:
            for entry in entries[: mark.entries]:
                file.write(line_of(entry))
        while self.unwritten and self.unwritten[0][0].entries <= mark.entries:
            self.unwritten.popleft()
        self.written = mark


def line_of(entry: Mapping[str, Any]) -> bytes:
    """A log as a line of the file.

    Raises:
        TypeError, ValueError: JSON can't hold it.
    """
    return json.dumps(entry).encode() + b"\n"


@dataclass(frozen=True)
class FoundHistory:
    """The logs of a checkpoint, as they were found.

    Attributes:
        entries: the logs.
        file: of the checkpoint.
        digest: over the bytes that were read.
        mark: what state.json says of the file; None where an earlier format held the logs in state.json, or where not
            all of them were found.
        problem: in words, what is missing.
    """

    entries: list[dict[str, Any]]
    file: Path
    digest: Any
    mark: Mark | None = None
    problem: str | None = None


def read_history(path: Path, state: Mapping[str, Any]) -> FoundHistory:
    """Read the logs of a checkpoint. A file that is missing, cut off or altered keeps no run from going on.

    Args:
        path: the checkpoint.
        state: what ``read_state`` gave for it.
    """
    file = path / HISTORY
    if "log_history" not in state:
        return FoundHistory(list(state["progress"]["log_history"]), file, None)
    mark = Mark(**state["log_history"])
    try:
        with file.open("rb") as opened:
            data = opened.read(min(mark.bytes, os.fstat(opened.fileno()).st_size))
    except OSError as error:
        data, found = b"", f"it can't be read: {error.strerror}"
    else:
        found = f"it has {len(data)} of {mark.bytes} bytes" if len(data) < mark.bytes else "it was altered"
    entries, digest = entries_of(data)[: mark.entries], hashlib.sha256(data)
    if len(entries) == mark.entries and digest.hexdigest() == mark.sha256:
        return FoundHistory(entries, file, digest, mark)
    problem = f"{file} isn't what was saved ({found}): {len(entries)} of {mark.entries} logs are left."
    return FoundHistory(entries, file, digest, None, problem)


def entries_of(data: bytes) -> list[dict[str, Any]]:
    """The logs in the bytes of a file, up to the first line that is cut off or no log."""
    *lines, _ = data.split(b"\n")
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries
