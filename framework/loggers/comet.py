"""A logger that writes experiments of Comet."""

from collections.abc import Sequence
from typing import Any

from .base import LoggedRun, with_groups
from .tracker import Tracker
from .values import Array


class CometLogger(Tracker):
    """Writes an experiment of Comet (the extra ``comet``).

    Args:
        project: which the experiment belongs to; None means Comet's own default.
        online: False writes an archive that ``comet upload`` sends; a run that is resumed then writes another archive
            of the same experiment.
        **config: of ``comet_ml.ExperimentConfig``: ``tags``, ``offline_directory``, ``log_code``.
    """

    word, package = "comet", ("comet_ml", "comet")

    def __init__(self, project: str | None = None, online: bool = True, **config: Any) -> None:
        self.place: dict[str, Any] = {"project_name": project, "online": online}
        self.config = config

    def start(self, fit: LoggedRun, kept: str | None) -> str:
        """Begin an experiment, or go on with a kept one."""
        import comet_ml

        # What Comet would find out by itself is told here already.
        own = dict.fromkeys(("parse_args", "auto_param_logging", "auto_metric_logging", "auto_output_logging"), False)
        config = comet_ml.ExperimentConfig(**{"name": fit.name, **own, **self.config})
        mode = "create" if kept is None else "get"
        self.experiment = comet_ml.start(**self.place, mode=mode, experiment_key=kept, experiment_config=config)
        if kept is None:
            self.experiment.log_parameters(fit.settings(), nested_support=False)
        return str(self.experiment.get_key())

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics."""
        self.experiment.log_metrics(with_groups(metrics), step=step)

    def image(self, name: str, image: Array, step: int) -> None:
        """Log an image."""
        self.experiment.log_image(image, name=name, step=step, image_minmax=(0, 255))

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text."""
        self.experiment.log_text(text, step=step, metadata={"name": name})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Keep a table as an asset."""
        self.experiment.log_table(f"{name}-{step}.csv", [list(row) for row in rows], headers=list(columns))

    def close(self) -> None:
        """End the experiment."""
        self.experiment.end()
