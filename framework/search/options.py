"""The options of a search, checked together before anything begins."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

from ...precision.names import did_you_mean

SAMPLERS = ("tpe", "random", "nsga2")
PRUNERS = ("median", "successive_halving", "hyperband")
DIRECTIONS = ("minimize", "maximize")
TAKES = ("best", "last")

Space = Callable[[Any], Mapping[str, Any]] | Mapping[str, Any]


def import_optuna() -> ModuleType:
    """Import the package Optuna.

    Raises:
        ImportError: Optuna isn't installed; the message says what to install.
    """
    # Optuna keeps its failed optional imports with their tracebacks, whose frames lead to the callers of the first
    # import: a Fit among these, with its module, data and process groups, would never be freed. So a thread, which has
    # no callers, imports it.
    if "optuna" not in sys.modules and find_spec("optuna") is not None:
        importing = Thread(target=import_module, args=("optuna",), name="import optuna")
        importing.start()
        importing.join()
    try:
        import optuna
    except ImportError as error:
        raise ImportError("A hyperparameter search needs Optuna: pip install 'stratagem[search]'.") from error
    return optuna


@dataclass(frozen=True)
class SearchOptions:
    """The arguments of ``Fit.hyperparameter_search``, where they are explained.

    Raises:
        ValueError, TypeError: an option can't work, or two contradict each other; all of them are listed.
    """

    space: Space
    objective: str | Sequence[str] | None = None
    direction: str | Sequence[str] = "minimize"
    take: str = "best"
    n_trials: int | None = 20
    timeout: float | None = None
    storage: Any = None
    study_name: str = "search"
    pruner: Any = None
    sampler: Any = None
    catch: tuple[type[Exception], ...] = ()
    remove_losing_checkpoints: bool = False
    plot: bool = False

    def __post_init__(self) -> None:
        optuna = import_optuna()
        if not callable(self.space) and not (isinstance(self.space, Mapping) and self.space):
            raise TypeError(
                "space takes a function of an Optuna trial that returns arguments by name (lambda trial: "
                "{'learning_rate': trial.suggest_float('learning_rate', 1e-5, 1e-1, log=True)}), or a mapping of names "
                f"to Optuna's distributions. Received: {self.space!r:.200}"
            )
        names = [self.objective] if isinstance(self.objective, str) else self.objective
        if names is not None and (callable(names) or not names or not all(isinstance(name, str) for name in names)):
            raise TypeError(
                "objective takes the name of one metric of an evaluation ('loss', 'accuracy'), or a list of names. "
                f"Received: {self.objective!r}. Compute what you need in compute_metrics or the module's metrics()."
            )
        problems: list[str] = []

        def require(holds: bool, name: str, why: str) -> None:
            if not holds:
                problems.append(f"{name}={getattr(self, name)!r}: {why}")

        if isinstance(self.space, Mapping):
            wrong = [n for n, d in self.space.items() if not isinstance(d, optuna.distributions.BaseDistribution)]
            require(not wrong, "space", f"{', '.join(wrong)}: give optuna.distributions, such as FloatDistribution")
        require(len(set(self.metrics)) == len(self.metrics), "objective", "names a metric twice")
        unknown = [each for each in self.directions if each not in DIRECTIONS]
        require(not unknown, "direction", f"must be one of {', '.join(map(repr, DIRECTIONS))}")
        require(
            len(self.directions) == len(self.metrics),
            "direction",
            f"give one for each of the {len(self.metrics)} objectives, {', '.join(self.metrics)}",
        )
        require(self.take in TAKES, "take", f"must be one of {', '.join(map(repr, TAKES))}")
        counted = self.n_trials is None or (type(self.n_trials) is int and self.n_trials >= 1)
        require(counted, "n_trials", "must be a number of trials, at least 1, or None")
        timed = self.timeout is None or (
            isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool) and self.timeout > 0
        )
        require(timed, "timeout", "must be seconds above 0, or None")
        ends = self.n_trials is not None or self.timeout is not None
        require(ends, "n_trials", "with timeout=None the search would never end; give one of them")
        named = isinstance(self.study_name, str) and Path(self.study_name).name == self.study_name
        require(named and self.study_name not in ("", ".", ".."), "study_name", "names a directory: a word, no path")
        if isinstance(self.pruner, str):
            require(self.pruner in PRUNERS, "pruner", did_you_mean(self.pruner, PRUNERS))
        else:
            is_pruner = self.pruner is None or isinstance(self.pruner, optuna.pruners.BasePruner)
            require(is_pruner, "pruner", f"must be {', '.join(map(repr, PRUNERS))}, one of optuna.pruners, or None")
        several = "Optuna prunes by one objective only; leave pruner out, or give one objective"
        require(self.pruner is None or len(self.metrics) == 1, "pruner", several)
        if isinstance(self.sampler, str):
            require(self.sampler in SAMPLERS, "sampler", did_you_mean(self.sampler, SAMPLERS))
        else:
            is_sampler = self.sampler is None or isinstance(self.sampler, optuna.samplers.BaseSampler)
            require(is_sampler, "sampler", f"must be {', '.join(map(repr, SAMPLERS))}, one of optuna.samplers, or None")
        pickles = "pickles its state into the storage, and nothing here reads a pickle; use 'tpe' or 'nsga2'"
        require(not isinstance(self.sampler, optuna.samplers.CmaEsSampler), "sampler", pickles)
        is_storage = self.storage is None or isinstance(self.storage, str | optuna.storages.BaseStorage)
        require(
            is_storage, "storage", "must be a URL ('sqlite:///search.db', 'journal:///path/search.log'), or a storage"
        )
        redis = isinstance(self.storage, optuna.storages.JournalStorage) and hasattr(
            self.storage._backend, "save_snapshot"
        )
        require(not redis, "storage", "pickles snapshots of the study; use 'journal:///path/search.log' or a database")
        catches = isinstance(self.catch, tuple) and all(
            isinstance(each, type) and issubclass(each, Exception) for each in self.catch
        )
        require(catches, "catch", "must be a tuple of exception classes, e.g. catch=(torch.OutOfMemoryError,)")
        require(
            not self.plot or find_spec("matplotlib") is not None,
            "plot",
            "needs matplotlib, which isn't installed: pip install matplotlib, or leave plot out",
        )
        if problems:
            raise ValueError("This search can't work:\n  " + "\n  ".join(problems))

    @property
    def metrics(self) -> list[str]:
        """The names of the objectives in the metrics of an evaluation, as "eval_loss"."""
        names = "loss" if self.objective is None else self.objective
        listed = [names] if isinstance(names, str) else list(names)
        return [name if name.startswith("eval_") else f"eval_{name}" for name in listed]

    @property
    def directions(self) -> list[str]:
        """The direction of each objective."""
        return [self.direction] if isinstance(self.direction, str) else list(self.direction)

    def value(self, index: int, history: Sequence[float]) -> float:
        """Return the value of an objective for a run.

        Args:
            index: the place of the objective.
            history: its values in the evaluations of the run, in order.

        Returns:
            The best or the last value, as ``take`` says; NaN where no value is a number.
        """
        if self.take == "last":
            return history[-1] if history else math.nan
        numbers = [value for value in history if not math.isnan(value)]
        best = min if self.directions[index] == "minimize" else max
        return best(numbers, default=math.nan)
