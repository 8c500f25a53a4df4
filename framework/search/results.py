"""The results of a search: its trials, the best of them, or the Pareto front."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrialResult:
    """One trial of a study.

    Attributes:
        number: the number of the trial in the study.
        state: "complete", "pruned", "failed", "running" (in another process) or "waiting" (to be run again).
        values: the values of the objectives, in their order; the last value of a pruned trial; else empty.
        params: every parameter that the trial suggested, those of ``module_init`` included.
        arguments: the fields of FitArguments that the trial set, its seed included.
        directory: the directory of the run.
        error: why a trial failed.
        retry_of: the trial that this one ran again, because its process had died.
        seconds: how long the trial took.
    """

    number: int
    state: str
    values: tuple[float, ...]
    params: dict[str, Any]
    arguments: dict[str, Any]
    directory: Path | None
    error: str | None
    retry_of: int | None
    seconds: float | None


@dataclass(frozen=True)
class SearchOutput:
    """What ``fit.hyperparameter_search`` returns, the same on every rank.

    Attributes:
        study_name: the name of the study.
        objectives: the names of the metrics.
        best: the best trial; None where no trial was completed, or there are several objectives.
        pareto: with several objectives, the trials that no other is better than in all of them.
        trials: all trials of the study, in their order.
        study: Optuna's study, on the main process; None on others.
    """

    study_name: str
    objectives: tuple[str, ...]
    best: TrialResult | None
    pareto: tuple[TrialResult, ...]
    trials: tuple[TrialResult, ...]
    study: Any = None
