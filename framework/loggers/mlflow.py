"""A logger that writes runs of MLflow."""

import json
import time
from collections.abc import Sequence
from typing import Any

from .base import LoggedRun, with_groups
from .tracker import Tracker
from .values import Array


class MlflowLogger(Tracker):
    """Writes a run of MLflow (the extra ``mlflow``). It isn't the active one of ``mlflow.log_...``: that is yours.
    ``tracking_uri`` is a server or a store ("sqlite:///runs.db"); None means MLFLOW_TRACKING_URI, or MLflow's default.
    """

    word, package = "mlflow", ("mlflow", "mlflow")

    def __init__(self, experiment: str = "stratagem", tracking_uri: str | None = None, **tags: str) -> None:
        self.experiment, self.tracking_uri, self.tags = experiment, tracking_uri, tags

    def start(self, fit: LoggedRun, kept: str | None) -> str:
        """Begin a run, or go on with a kept one, whose parameters MLflow leaves as they are."""
        import mlflow

        self.client, self.metric = mlflow.MlflowClient(self.tracking_uri), mlflow.entities.Metric
        if kept is not None:
            self.client.update_run(kept, status="RUNNING")
            return kept
        found = self.client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(self.experiment)
        run = self.client.create_run(experiment, run_name=fit.name, tags=self.tags).info.run_id
        params = [mlflow.entities.Param(name, str(value)[:6000]) for name, value in fit.settings().items()]
        for first in range(0, len(params), 100):  # as many as MLflow takes at once
            self.client.log_batch(run, params=params[first : first + 100])
        return str(run)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics in one request."""
        now, found = int(time.time() * 1000), with_groups(metrics).items()
        self.client.log_batch(self.id, metrics=[self.metric(name, float(value), now, step) for name, value in found])

    def image(self, name: str, image: Array, step: int) -> None:
        """Log an image."""
        self.client.log_image(self.id, image, key=name, step=step)

    def text(self, name: str, text: str, step: int, suffix: str = "md") -> None:
        """Keep a text as an artifact."""
        self.client.log_text(self.id, text, f"{name}/{step}.{suffix}")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Keep a table as an artifact that MLflow shows as one."""
        self.text(name, json.dumps({"columns": columns, "data": rows}, default=str), step, "json")

    def close(self) -> None:
        """Finish the run."""
        self.client.set_terminated(self.id)
