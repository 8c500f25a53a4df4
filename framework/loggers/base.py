"""What a logger does: takes numbers by name at a step, and what else it can show, on the main process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ...strategies.base import Strategy
from ..arguments import FitArguments, other_than_defaults
from ..state import TrainState
from .values import Array, Histogram

VERBS = ("image", "text", "histogram", "table")
"""What a logger may show besides numbers."""


class Planned(Protocol):
    """A plan, as far as it is logged."""

    @property
    def given(self) -> FitArguments:
        """The arguments as they were given."""


class LoggedChoice(Protocol):
    """Why a Fit has its strategy, where that was chosen for it."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON types."""

    @property
    def words(self) -> str:
        """The words of a command line that would have named what was chosen."""


class LoggedFit(Protocol):
    """A Fit, as far as it is logged."""

    @property
    def args(self) -> FitArguments:
        """The arguments as the run follows them."""

    @property
    def plan(self) -> Planned:
        """The plan of the run."""

    @property
    def choice(self) -> LoggedChoice | None:
        """Why it has its strategy; None where that was named."""

    state: TrainState
    strategy: Strategy


@dataclass(frozen=True)
class LoggedRun:
    """What loggers are told of the Fit, as it was at that moment: they may read it later, from a thread.

    Attributes:
        args: the arguments as the run follows them; ``output_dir`` and ``run_name`` say where its numbers belong.
        given: the arguments as they were given: epochs and fractions of the run aren't turned into updates.
        state: the progress, without its history; ``global_step`` is above 0 where training is resumed.
        strategy: ``configuration()`` returns what its package was configured with.
        choice: why it is this strategy, where it was chosen for the Fit; else None.
    """

    args: FitArguments
    given: FitArguments
    state: TrainState
    strategy: Strategy
    choice: LoggedChoice | None = None

    @classmethod
    def of(cls, fit: LoggedFit) -> "LoggedRun":
        """Note how a Fit is now."""
        return cls(fit.args, fit.plan.given, replace(fit.state, log_history=[]), fit.strategy, fit.choice)

    @property
    def name(self) -> str:
        """The ``run_name``; without one, the last part of ``output_dir``."""
        return self.args.run_name or Path(self.args.output_dir).absolute().name or "run"

    @property
    def is_resumed(self) -> bool:
        """Whether training goes on from a checkpoint."""
        return self.state.global_step > 0

    def settings(self) -> dict[str, Any]:
        """Return strategy (and the words that would have named it, where it was chosen), precision, the number of
        ranks, and every argument as it was given.
        """
        strategy = self.strategy
        placed = {"strategy": repr(strategy), "precision": strategy.precision.name, "ranks": strategy.world_size}
        chosen = {} if self.choice is None else {"choice": self.choice.words}
        return placed | chosen | self.given.to_dict()

    def chosen(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, without those that only name the run."""
        chosen, arguments = set(other_than_defaults(self.given)) - {"output_dir", "run_name"}, self.given.to_dict()
        return {name: value for name, value in self.settings().items() if name not in arguments or name in chosen}


class Logger:
    """Somewhere numbers go. Called on the main process only, in this order::

        open            at the first train, evaluate or predict of the Fit
        begin           at each train
        log             of each log, evaluation and prediction, in training or outside of it
        event           of each checkpoint, and of the end of each train
        image, text, histogram, table       of ``fit.loggers.image(...)`` and the like
        flush           at the end of each train, and where it fails
        close           fit.close(), the end of ``with Fit(...) as fit``, or the end of the Fit or the process

    So one run of W&B or MLflow, made in ``open`` and finished in ``close``, holds everything that a Fit does. In a
    search, loggers are opened for the ``output_dir`` of each trial and closed after the trial.

    All of it is called from a thread of the logger's own, in that order, while training goes on: one that stalls costs
    training nothing. An exception doesn't end training: it is warned of, once, by a LoggerWarning. A verb that a logger
    doesn't define is left out there, which is said once.

    Attributes:
        synchronous: whether it is called at once instead, in the loop, which waits for it: what was logged before the
            process is killed is then written.
        package: the package that it needs, and the extra of stratagem's that installs it.

    Example:
        >>> class Print(Logger):
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
    """

    synchronous: ClassVar[bool] = False
    package: ClassVar[tuple[str, str] | None] = None

    def open(self, fit: LoggedRun) -> None:
        """Make files and connections: here, not in the constructor. ``fit.args.output_dir`` is where they belong.

        Args:
            fit: the Fit as it is now.
        """

    def begin(self, fit: LoggedRun) -> None:
        """Note that training begins, or is resumed where ``fit.state.global_step`` is above 0."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write down numbers that belong to an update."""

    def event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Write down what happened at an update, where that is of interest; most loggers leave this out.

        Args:
            event: "save" and "remove" of a checkpoint, whose directory's name is ``details["checkpoint"]``; "finish",
                "interrupt" (by a signal) and "fail" of the run, with ``details["reason"]``.
            step: the update.
            details: JSON types by name. "time" says when it was, in ISO 8601, where it wasn't just now.
        """

    def image(self, name: str, image: Array, step: int) -> None:
        """Show an image: an array of uint8 with the shape (height, width, 3)."""

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text in Markdown."""

    def histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Show how often values fall between edges."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Show a table."""

    def flush(self) -> None:
        """Have everything that was logged readable when this returns."""

    def close(self) -> None:
        """Let go of what ``open`` made, with everything that was logged readable."""


def grouped(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Sort numbers by what they are of: "train", "eval", "test" or another prefix of an evaluation, "totals".

    Example:
        >>> grouped({"loss": 2.0, "epoch": 1.0}), grouped({"eval_loss": 3.0})
        ({'train': {'loss': 2.0, 'epoch': 1.0}}, {'eval': {'loss': 3.0}})
    """
    if "train_runtime" in metrics:
        return {"totals": {name: value for name, value in metrics.items() if name != "epoch"}}
    groups: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        prefix, _, rest = name.partition("_")
        of_evaluation = prefix in ("eval", "test") or ("loss" not in metrics and f"{prefix}_loss" in metrics)
        group, tag = (prefix, rest) if rest and of_evaluation else ("train", name)
        groups.setdefault(group, {})[tag] = value
    if len(groups) > 1 and groups.get("train", {}).keys() == {"epoch"}:  # it comes with every evaluation
        groups["train"].pop("epoch")
    return {group: numbers for group, numbers in groups.items() if numbers}


def with_groups(metrics: Mapping[str, float]) -> dict[str, float]:
    """Name numbers as trackers group charts: "train/loss", "eval/loss"; "epoch" stays."""
    named = {f"{group}/{tag}": value for group, found in grouped(metrics).items() for tag, value in found.items()}
    named.pop("train/epoch", None)
    return named | ({"epoch": metrics["epoch"]} if "epoch" in metrics else {})
