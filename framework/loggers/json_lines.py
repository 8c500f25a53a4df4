"""One JSON object a line: a log that any tool reads, and that a killed run leaves whole up to its last line."""

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Logger

if TYPE_CHECKING:
    from ..fit import Fit


class JsonLinesLogger(Logger):
    """Appends ``{"step": 50, "loss": 2.1, ...}`` to a file.

    A resumed run goes on in the same file after a line ``{"step": ..., "event": "resume"}``; numbers that aren't finite
    are written as strings, which JSON can hold. That line holds the ``run_name``, and what the strategy's package was
    configured with. A line that the disk has no place for is left out whole.

    Args:
        path: the file; None means ``<output_dir>/log.jsonl``.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.current: Path | None = None  # the file of this life
        self.file: FileIO | None = None

    def open(self, fit: "Fit") -> None:
        """Open the file for appending."""
        self.current = self.path or Path(fit.args.output_dir) / "log.jsonl"
        self._open_file(self.current)

    def begin(self, fit: "Fit") -> None:
        """Note that training begins or resumes."""
        begin: dict[str, Any] = {"step": fit.state.global_step, "event": "resume" if fit.state.global_step else "begin"}
        if fit.args.run_name is not None:
            begin["run_name"] = fit.args.run_name
        if configuration := fit.strategy.configuration():
            begin["configuration"] = dict(configuration)
        self._write(begin)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write one line and hand it to the system."""
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
        if is_cut_off:  # a kill in the middle of a line, which must not swallow the next one
            self._append(self.file, b"\n")
        return self.file

    def _write(self, row: dict[str, Any]) -> None:
        assert self.current is not None, "a logger is opened first"
        if self.file is not None and os.fstat(self.file.fileno()).st_nlink == 0:  # somebody has removed it
            self.file.close()
            self.file = None
        file = self.file or self._open_file(self.current)
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._append(file, json.dumps(plain).encode() + b"\n")

    def _append(self, file: FileIO, line: bytes) -> None:
        """Write all of it or nothing, as far as the system lets us take the beginning back."""
        length = os.fstat(file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:]) or 0
        except OSError:
            try:
                file.truncate(length)
            except OSError:  # the next line is to look for a cut-off one
                self.file = None
                file.close()
            raise
