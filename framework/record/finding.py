"""Finds runs in directories, and reads what each has written: its log as far as it goes, and its record."""

import os
import time
from pathlib import Path

from .history import History, seconds_of
from .log_file import LogFile
from .run_file import NAME, read_record

LOG = "log.jsonl"
DEPTH = 3  # folders below the one that is named, in which runs are looked for
MOST_RUNS = 500


class Run:
    """A run on the disk.

    Args:
        directory: its ``output_dir``.

    Attributes:
        record: run.json's content; empty where there is none.
        history: what its log says.
        log: where its lines come from.
        is_there: whether its log is.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = LogFile(directory / LOG)
        self.history = History()
        self.record = read_record(directory / NAME)
        self.is_there = False
        self._stamp = 0.0

    @property
    def name(self) -> str:
        """What it is called: its name, else its directory's."""
        given = self.history.run_name or self.record.get("run_name")
        return str(given) if given else self.directory.resolve().name or str(self.directory)

    @property
    def max_steps(self) -> int:
        """Updates in the whole run; 0 where neither log nor record says."""
        length = self.history.max_steps or self.record.get("max_steps")
        return length if isinstance(length, int) and length > 0 else 0

    @property
    def seen(self) -> float | None:
        """When it gave its last sign of life, in seconds since 1970: its last line, else the change of its log."""
        if self.history.time is not None:
            return self.history.time
        try:
            return (self.directory / LOG).stat().st_mtime
        except OSError:
            return seconds_of((self.record.get("sessions") or [{}])[-1].get("last_time"))

    def read(self) -> bool:
        """Read what is new. Returns whether anything was."""
        is_other, lines = self.log.read()
        if is_other:
            self.history = History()
        for line in lines:
            self.history.take(line)
        self.is_there = (self.directory / LOG).is_file()
        return self._read_record() or is_other or bool(lines)

    def _read_record(self) -> bool:
        try:
            stamp = os.stat(self.directory / NAME).st_mtime
        except OSError:
            return False
        if stamp == self._stamp:
            return False
        self._stamp, self.record = stamp, read_record(self.directory / NAME) or self.record
        return True

    def silent_for(self) -> float | None:
        """Seconds since its last sign of life; None where none is known."""
        return None if self.seen is None else max(0.0, time.time() - self.seen)


def is_run(directory: Path) -> bool:
    """Whether a directory holds what a run writes."""
    return (directory / LOG).is_file() or (directory / NAME).is_file()


def runs_in(directory: Path) -> list[Run]:
    """The run in a directory, or those in the folders below it, in the order of their names."""
    if is_run(directory):
        return [Run(directory)]
    found: list[Path] = []
    look_below(directory, DEPTH, found)
    return [Run(path) for path in found]


def look_below(directory: Path, depth: int, found: list[Path]) -> None:
    """Add the runs in the folders of a directory."""
    try:
        folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return
    for folder in folders:
        if len(found) >= MOST_RUNS or folder.name.startswith((".", "checkpoint-")):
            continue
        if is_run(folder):
            found.append(folder)
        elif depth > 1:
            look_below(folder, depth - 1, found)
