"""Reads log.jsonl while it grows: whole lines only, whatever is damaged, missing, cut off, or replaced by another."""

import json
import os
from pathlib import Path
from typing import Any

PART = 1 << 20  # bytes read at once
LONGEST_LINE = 1 << 20


class LogFile:
    """The lines of a log that were written since they were read last.

    Args:
        path: of the file, which needn't be there yet.

    Attributes:
        damaged: lines that couldn't be read.

    Example:
        >>> LogFile(Path("not/there/yet/log.jsonl")).read()
        (False, [])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._file: tuple[int, int] | None = None  # device and number of the file that was read
        self._position = 0
        self._rest = b""

    def read(self) -> tuple[bool, list[Any]]:
        """Read what is new.

        Returns:
            (is_other, lines): whether the file is another than was read last, or was cut short, so that what was read
            before is void; and the lines.
        """
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except OSError:
            return False, []

    def _read(self, file: Any) -> tuple[bool, list[Any]]:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        is_other = self._file is not None and (identity != self._file or status.st_size < self._position)
        if is_other or self._file is None:
            self._file, self._position, self._rest, self.damaged = identity, 0, b"", 0
        file.seek(self._position)
        found: list[Any] = []
        while part := file.read(PART):
            self._position += len(part)
            *whole, self._rest = (self._rest + part).split(b"\n")
            for line in whole:
                self._take(line, found)
            if len(self._rest) > LONGEST_LINE:
                self._rest = b"{"  # the line can't be read any more, and counts as damaged at its end
        return is_other, found

    def _take(self, line: bytes, found: list[Any]) -> None:
        if not line.strip():
            return
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            self.damaged += 1
