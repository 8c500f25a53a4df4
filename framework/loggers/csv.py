"""A logger that writes a table of comma-separated values."""

import csv
import os
from pathlib import Path

from .base import LoggedRun, Logger


class CSVLogger(Logger):
    """Writes a row for each log and a column for each name into ``path``, or ``<output_dir>/metrics.csv``. A resumed
    run takes back the rows beyond where it resumes from; one that begins anew moves the file aside (metrics-1.csv).
    """

    synchronous = True

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()

    def open(self, fit: LoggedRun) -> None:
        """Read the columns of the file that is there."""
        self.current = self.path or Path(fit.args.output_dir) / "metrics.csv"
        self.columns, self.has_begun = self._read()[0], False

    def begin(self, fit: LoggedRun) -> None:
        """Make way for a run that begins anew, or that goes on from an earlier update than the last row."""
        step, (columns, rows) = fit.state.global_step, self._read()
        if fit.is_resumed and rows:
            self._rewrite(columns, [row for row in rows if int(row["step"]) <= step])
        elif not fit.is_resumed and not self.has_begun and rows:
            taken = (self.current.with_stem(f"{self.current.stem}-{number}") for number in range(1, 10**6))
            os.replace(self.current, next(path for path in taken if not path.exists()))
        self.has_begun = True

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write a row, and hand it to the operating system."""
        row = {"step": step, **metrics}
        self.columns = self.columns if self.current.exists() else []
        if new := [name for name in row if name not in self.columns]:
            self._rewrite([*self.columns, *new], self._read()[1])
        with self.current.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.current.exists():
            return [], []
        with self.current.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            whole = [row for row in reader if None not in row and (row.get("step") or "").isdigit()]
            return list(reader.fieldnames or ()), whole

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self.columns, partial = columns, self.current.with_name(f"{self.current.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.current)
