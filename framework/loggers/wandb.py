"""A logger that writes runs of Weights & Biases."""

import os
from collections.abc import Sequence
from typing import Any

from .base import LoggedRun, grouped, with_groups
from .tracker import Tracker
from .values import Array, Histogram


class WandbLogger(Tracker):
    """Writes a run of Weights & Biases (the extra ``wandb``), or into one that the program has begun. ``init`` is what
    ``wandb.init`` is given (project, mode). A resumed run may go back: charts are over "update", not W&B's own steps.
    """

    word, package = "wandb", ("wandb", "wandb")

    def __init__(self, **init: Any) -> None:
        self.init = init

    def start(self, fit: LoggedRun, kept: str | None) -> str:
        """Begin a run, or go on with a kept one."""
        import wandb

        place = os.environ.get("WANDB_DIR", fit.args.output_dir)
        os.makedirs(place, exist_ok=True)
        own = {"name": fit.name, "config": fit.settings(), "id": kept, "resume": "allow", "dir": place, **self.init}
        self.package_itself, self.run = wandb, wandb.init(**own)
        self.run.define_metric("update", hidden=True)
        self.run.define_metric("*", step_metric="update")
        return str(self.run.id)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log a row; totals go to the summary."""
        if "totals" in grouped(metrics):
            self.run.summary.update(metrics)
            return
        self.run.log({**with_groups(metrics), "update": step})

    def image(self, name: str, image: Array, step: int) -> None:
        """Log an image."""
        self.run.log({name: self.package_itself.Image(image), "update": step})

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text as a table of one cell."""
        self.table(name, ["text"], [[text]], step)

    def histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Log a histogram."""
        counted = self.package_itself.Histogram(np_histogram=(histogram.counts, histogram.edges))
        self.run.log({name: counted, "update": step})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table."""
        self.run.log({name: self.package_itself.Table(columns=list(columns), data=list(rows)), "update": step})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
