"""One JSON object a line: a log that any tool reads, and that a killed run leaves whole up to its last line."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .base import Logger

if TYPE_CHECKING:
    from ..fit import Fit


class JsonLinesLogger(Logger):
    """Appends ``{"step": 50, "loss": 2.1, ...}`` to a file.

    A resumed run goes on in the same file after a line ``{"step": ..., "event": "resume"}``; numbers that aren't finite
    are written as strings, which JSON can hold. That line holds the ``run_name``, and what the
    strategy's package was configured with.

    Args:
        path: the file; None means ``<output_dir>/log.jsonl``.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.file: TextIO | None = None

    def open(self, fit: "Fit") -> None:
        """Open the file for appending and note that training begins or resumes."""
        path = self.path or Path(fit.args.output_dir) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        is_cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = path.open("a", encoding="utf-8")
        if is_cut_off:  # a kill in the middle of a line, which must not swallow the next one
            self.file.write("\n")
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
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is None:  # an evaluation outside training
            return
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()
