"""What a logger does: takes numbers by name at a step, on the main process."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..fit import Fit


class Logger:
    """Somewhere numbers go. Called on the main process only, in this order::

        open            at the first train, evaluate or predict of the Fit
        begin           at each train
        log             of each log, evaluation and prediction, in training or outside of it
        flush           at the end of each train, and where it fails
        close           fit.close(), the end of ``with Fit(...) as fit``, or the end of the Fit or the process

    So one run of W&B or MLflow, made in ``open`` and finished in ``close``, holds all that a Fit does. In a search each
    trial is a life of its own: its loggers are opened for the trial's ``output_dir`` and closed after it.

    What a method raises doesn't end training: it is a LoggerWarning, once.

    Example:
        >>> class Print(Logger):
        ...     def log(self, metrics, step):
        ...         print(step, metrics)
    """

    def open(self, fit: "Fit") -> None:
        """Make files and connections: here, not in the constructor. ``fit.args.output_dir`` is where they belong."""

    def begin(self, fit: "Fit") -> None:
        """Training begins, or is resumed where ``fit.state.global_step`` is above 0."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write down numbers that belong to an update."""

    def flush(self) -> None:
        """Everything logged so far must be readable after this."""

    def close(self) -> None:
        """Let go of what ``open`` made; everything logged must be readable after this."""
