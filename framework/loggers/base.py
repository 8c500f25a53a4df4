"""What a logger does: takes numbers by name at a step, on the main process."""

from collections.abc import Mapping
from typing import Any, Protocol

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..state import TrainState


class LoggedRun(Protocol):
    """What loggers read of the Fit that they are given."""

    @property
    def args(self) -> FitArguments:
        """The arguments of the run; ``output_dir`` and ``run_name`` say where its numbers belong."""

    @property
    def state(self) -> TrainState:
        """The progress; ``global_step`` is above 0 where training is resumed."""

    @property
    def strategy(self) -> Strategy:
        """The strategy; ``configuration()`` returns what its package was configured with."""


class Logger:
    """Somewhere numbers go. Called on the main process only, in this order::

        open            at the first train, evaluate or predict of the Fit
        begin           at each train
        log             of each log, evaluation and prediction, in training or outside of it
        event           of each checkpoint, and of the end of each train
        flush           at the end of each train, and where it fails
        close           fit.close(), the end of ``with Fit(...) as fit``, or the end of the Fit or the process

    So one run of W&B or MLflow, made in ``open`` and finished in ``close``, holds everything that a Fit does. In a
    search, loggers are opened for the ``output_dir`` of each trial and closed after the trial.

    An exception in one of these methods doesn't end training: it is warned of, once, by a LoggerWarning.

    Example:
        >>> class Print(Logger):
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
    """

    def open(self, fit: LoggedRun) -> None:
        """Make files and connections: here, not in the constructor. ``fit.args.output_dir`` is where they belong.

        Args:
            fit: the Fit; see LoggedRun for what a logger should read of it.
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

    def flush(self) -> None:
        """Have everything that was logged readable when this returns."""

    def close(self) -> None:
        """Let go of what ``open`` made, with everything that was logged readable."""
