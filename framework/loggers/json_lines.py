"""A log with one JSON object a line: any tool reads it, and a killed run leaves all lines but the last whole."""

import json
import math
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from ..process_memory import held
from .base import LoggedRun, Logger


class JsonLinesLogger(Logger):
    """Appends ``{"step": 50, "time": "2026-11-29T07:10:00.123Z", "loss": 2.1, ...}`` to a file.

    A run begins with a line ``{"step": ..., "event": "begin"}``, and goes on in the same file after a line with the
    event "resume" where it is resumed. That line holds ``max_steps`` and the ``run_name``, too, what the strategy's
    package was configured with, and why the strategy was chosen ("choice", with ``strategy="auto"``). Checkpoints that
    are saved ("save") or removed ("remove"), and the end of a run ("finish", "interrupt", "fail"), have a line with
    that event. Once a second, a line of numbers holds the bytes of memory that the process has:
    ``memory_cpu_resident`` and, on a GPU, ``memory_gpu_allocated`` and ``_reserved``. Numbers that aren't finite are
    written as strings, which JSON can hold. A line for which the disk has no room is left out whole.

    Args:
        path: the file; None means ``<output_dir>/log.jsonl``.
    """

    synchronous = True

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.current: Path | None = None  # the file that was opened last
        self.file: FileIO | None = None
        self.device = torch.device("cpu")
        self.memory_read = -math.inf  # when the memory was read last

    def open(self, fit: LoggedRun) -> None:
        """Open the file for appending."""
        self.device = fit.strategy.device
        self.current = self.path or Path(fit.args.output_dir) / "log.jsonl"
        self._open_file(self.current)

    def begin(self, fit: LoggedRun) -> None:
        """Write the line that says that training begins, or is resumed."""
        begin: dict[str, Any] = {"event": "resume" if fit.state.global_step else "begin"}
        begin["max_steps"] = fit.state.max_steps
        if fit.args.run_name is not None:
            begin["run_name"] = fit.args.run_name
        if configuration := fit.strategy.configuration():
            begin["configuration"] = dict(configuration)
        if fit.choice is not None:
            begin["choice"] = fit.choice.to_dict()
        self._write(fit.state.global_step, begin)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write one line and hand it to the operating system."""
        now = time.monotonic()
        if now - self.memory_read >= 1.0:
            self.memory_read = now
            metrics = {**metrics, **held(self.device)}
        self._write(step, metrics)

    def event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Write one line."""
        self._write(step, {"event": event, **details})

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

    def _write(self, step: int, row: Mapping[str, Any]) -> None:
        assert self.current is not None, "a logger is opened first"
        if self.file is not None and os.fstat(self.file.fileno()).st_nlink == 0:  # somebody has removed the file
            self.file.close()
            self.file = None
        file = self.file or self._open_file(self.current)
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        whole = {"step": step, "time": now, **row}
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in whole.items()}
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
