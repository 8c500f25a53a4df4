"""Where a run is shown: what every screen can do, and the plain one, which prints lines."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .header import Rows
from .numbers import format_duration, format_epoch

LABEL = 10  # columns of a label


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        name: of the run; "" where it has none.
        update, updates: done, and in the whole run.
        epoch: passes over the data done.
        logs: the numbers of the last training log, as they are shown.
        rate: what is trained on in a second ("1,573 tokens/s"); "" before it is known.
        elapsed: seconds since training began or was resumed.
        left: seconds to the end; None before that is known.
        note: what was done last beside updates ("checkpoint-200 saved").
    """

    name: str
    update: int
    updates: int
    epoch: float
    logs: Mapping[str, str]
    rate: str
    elapsed: float
    left: float | None
    note: str = ""

    @property
    def place(self) -> str:
        """The update, behind the name of the run."""
        return f"{self.name} update {self.update}/{self.updates}".lstrip()

    @property
    def fraction(self) -> float:
        """The part of the updates that is done."""
        return self.update / self.updates if self.updates else 0.0

    @property
    def times(self) -> list[str]:
        """The time that has passed and, where it is known, what is left."""
        left = [] if self.left is None or self.update >= self.updates else [f"{format_duration(self.left)} left"]
        return [f"{format_duration(self.elapsed)} elapsed", *left]


class Lines:
    """Plain lines on standard output: of a run's beginning and end, and one for each log.

    Attributes:
        is_live: whether ``draw`` shows anything between two logs.
        seconds: between two pictures, at least.
    """

    is_live = False
    seconds = 1 / 8

    def begin(self, rows: Rows, status: Status) -> None:
        """Show what a run is."""
        self.show(rows)

    def show(self, rows: Rows) -> None:
        """Show labels, and what is said under each."""
        for label, text in rows:
            self.print(f"{label:<{LABEL}} {text}")

    def log(self, status: Status, shown: Mapping[str, str], is_training: bool) -> None:
        """Show the numbers of a log.

        Args:
            status: of now.
            shown: number by name, as they are shown.
            is_training: whether the log is of updates, and not of an evaluation.
        """
        self.print(line_of(status, shown, is_training, with_left=True))

    def draw(self, status: Status) -> None:
        """Show how far the run is."""

    def end(self, rows: Rows, status: Status) -> None:
        """Leave the last picture standing, and show how the run ended."""
        self.show(rows)

    def close(self) -> None:
        """Give back what the screen has taken."""

    def print(self, line: str) -> None:
        """Print a line at once.

        Raises:
            OSError, ValueError: the stream is broken or closed.
        """
        print(line, file=sys.stdout, flush=True)


def line_of(status: Status, shown: Mapping[str, str], is_training: bool, with_left: bool) -> str:
    """Write a log as one line that ``grep`` and ``cut -d'|'`` can take apart."""
    parts = [status.place, f"epoch {format_epoch(status.epoch)}"] if status.updates else []
    parts += [f"{name} {number}" for name, number in shown.items()]
    if is_training and status.rate:
        parts.append(status.rate)
    if is_training and with_left:
        parts += status.times[1:]
    return " | ".join(parts)
