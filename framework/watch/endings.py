"""The exceptions by which a run ends that something else than its own work ends: a signal, or another rank."""

from pathlib import Path

from ...strategies.failures import Failure
from ...strategies.statuses import ANOTHER_FAILED, INTERRUPTED


class Interrupted(SystemExit):
    """A signal asked the run to end, and it was saved: raised by ``fit.train`` on every rank. Unless a program catches
    it, its process ends with the status 143 (130 after Ctrl-C).

    Args:
        status: of the process, see ``strategies/statuses.py``.
        update: that the run stands at.
        path: the checkpoint; None where the run saves none (``save_strategy="no"``).
    """

    def __init__(self, status: int, update: int, path: Path | None) -> None:
        super().__init__(status)
        self.status, self.update, self.path = status, update, path

    def __str__(self) -> str:
        left = "no checkpoint, as save_strategy='no' asks for" if self.path is None else str(self.path)
        return f"interrupted after update {self.update}; the run left {left}"


class InterruptedByUser(Interrupted, KeyboardInterrupt):
    """The same after Ctrl-C: a program that catches KeyboardInterrupt catches it."""


class EvaluationInterrupted(BaseException):
    """A signal came in the middle of an evaluation in training. The loop saves the run, and raises Interrupted.

    Args:
        status: that the process is to end with.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class AnotherRankFailed(RuntimeError, SystemExit):
    """This rank had to end because another one failed first. A program that doesn't catch it ends with the status 70
    and without a traceback: the first failure's is the one to read.

    Args:
        failure: the first.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.what} on rank {failure.rank} (host {failure.host})")
        self.failure = failure
        self.code = ANOTHER_FAILED


def interruption(status: int, update: int, path: Path | None) -> Interrupted:
    """The exception of a run that was asked to end."""
    kind = InterruptedByUser if status == INTERRUPTED else Interrupted
    return kind(status, update, path)
