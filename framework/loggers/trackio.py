"""A logger that writes runs of Trackio."""

from collections.abc import Sequence
from typing import Any

from .base import LoggedRun, with_groups
from .tracker import Tracker
from .values import Array, Histogram


class TrackioLogger(Tracker):
    """Writes a run of Trackio (the extra ``trackio``): on this machine, ``trackio show`` draws it.

    Trackio finds runs by name: one that is resumed goes on in the newest of its name.

    Args:
        project: which the run belongs to.
        **init: of ``trackio.init``: ``space_id``, ``group``, ``auto_log_gpu``.
    """

    word, package = "trackio", ("trackio", "trackio")

    def __init__(self, project: str = "stratagem", **init: Any) -> None:
        self.init = {"project": project, **init}

    def start(self, fit: LoggedRun, kept: str | None) -> str:
        """Begin a run, or go on with the newest of a kept name."""
        import trackio

        name = fit.name if kept is None else kept
        resume = "never" if kept is None else "allow"
        chosen = {"name": name, "config": fit.settings(), "resume": resume, **self.init}
        self.package_itself, self.run = trackio, trackio.init(**chosen)
        return str(self.run.name)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics."""
        self.run.log(with_groups(metrics), step=step)

    def image(self, name: str, image: Array, step: int) -> None:
        """Log an image."""
        self.run.log({name: self.package_itself.Image(image)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text in Markdown."""
        self.run.log({name: self.package_itself.Markdown(text)}, step=step)

    def histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Log a histogram."""
        self.run.log({name: self.package_itself.Histogram(np_histogram=tuple(histogram))}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table."""
        self.run.log(
            {name: self.package_itself.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step
        )

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
