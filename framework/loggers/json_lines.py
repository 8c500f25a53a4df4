"""A log with one JSON object a line: any tool reads it, and a killed run leaves all lines but the last whole."""

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from .base import LoggedRun, Logger


class JsonLinesLogger(Logger):
    """Appends ``{"step": 50, "loss": 2.1, ...}`` to a file.

    A run begins with a line ``{"step": ..., "event": "begin"}``, and goes on in the same file after a line with the
    event "resume" where it is resumed. That line holds the ``run_name`` too, and what the strategy's package was
    configured with. Numbers that aren't finite are written as strings, which JSON can hold. A line for which the disk
    has no room is left out whole.

    Args:
        path: the file; None means ``<output_dir>/log.jsonl``.
    """

    synchronous = True

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.current: Path | None = None  # the file that was opened last
        self.file: FileIO | None = None

    def open(self, fit: LoggedRun) -> None:
        """Open the file for appending."""
        self.current = self.path or Path(fit.args.output_dir) / "log.jsonl"
        self._open_file(self.current)

    def begin(self, fit: LoggedRun) -> None:
        """Write the line that says that training begins, or is resumed."""
        begin: dict[str, Any] = {"step": fit.state.global_step, "event": "resume" if fit.state.global_step else "begin"}
        if fit.args.run_name is not None:
            begin["run_name"] = fit.args.run_name
        if configuration := fit.strategy.configuration():
            begin["configuration"] = dict(configuration)
        self._write(begin)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write one line and hand it to the operating system."""
        self._write({"step": step, **metrics})

    def close(self) -> None:
        """Close the file."""
        file, self.file, self.current = self.file, None, None
        if file is not None:
            file.close()

    def _open_file(self, path: Path) -> FileIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        # Without a buffer, which would keep a line that couldn't be written and write it again later.
        self.file = FileIO(path, "a")
        if is_cut_off:  # a run was killed in the middle of a line; the next line must not continue that one
            self._append(self.file, b"\n")
        return self.file

    def _write(self, row: dict[str, Any]) -> None:
        assert self.current is not None, "a logger is opened first"
        if self.file is not None and os.fstat(self.file.fileno()).st_nlink == 0:  # somebody has removed the file
            self.file.close()
            self.file = None
        file = self.file or self._open_file(self.current)
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._append(file, json.dumps(plain).encode() + b"\n")

    def _append(self, file: FileIO, line: bytes) -> None:
        """Write the whole line or nothing of it, as far as the system allows taking the beginning back."""
        length = os.fstat(file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:]) or 0
        except OSError:
            try:
                file.truncate(length)
            except OSError:  # opened again for the next line, which then looks for a cut-off one
                self.file = None
                file.close()
            raise
