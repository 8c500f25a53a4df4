"""A run whose strategy was chosen: where its first updates are out of memory on any rank, the next candidate follows.

The plan of what was chosen may have been wrong: it knows nothing of fragmentation, nor of what kernels need beside
tensors. So the run begins again where it began, under the next candidate that fits and may need less, and is to the bit
that candidate's run. ``framework/run/batch_size.py`` says what an attempt that failed takes back, and what it leaves.

An attempt lasts for two updates: the second is the first one that has the optimizer's state beside its activations. For
so long there is a copy of the module in the host's memory. Out of memory later ends the run, as it ends any other.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from ...strategies.played import look_here
from ..arguments import FitArguments
from ..callbacks import Callback
from ..run.attempts import OutOfMemory, Restartable, Standing, Start, attempt, forget_frames
from ..run.run import Run
from ..run.source import Source
from ..state import Control, TrainOutput, TrainState
from .choosing import Choice, Verdict

UPDATES = 2  # in which another candidate may take over
PART = 0.25  # of the host's memory for a rank that a copy of the module may take


class Choosing(Restartable, Protocol):
    """A Fit whose strategy was chosen for it, as far as a run that may be another candidate's knows it.

    Attributes:
        choice: of its strategy.
        source: of its module.
    """

    choice: Choice | None
    source: Source

    @property
    def run(self) -> Run:
        """The run that is to come."""

    def take_choice(self, choice: Choice) -> None:
        """Have the strategy, and the arguments, that a choice comes to; the module isn't placed."""


class FirstUpdates(Callback):
    """Counts the updates of an attempt.

    Args:
        over: called on this rank when all ranks are done with the first ``UPDATES``.
    """

    def __init__(self, over: Callable[[], None]) -> None:
        self.over, self.done = over, 0

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Count. Ranks exchange a message when an update begins, so that all are done with those before."""
        self.done += 1
        if self.done == UPDATES + 1:
            self.over()


def train(fit: Choosing, path: Path | None) -> TrainOutput:
    """Train from a checkpoint, or from the beginning, and begin again under another candidate as long as any rank is
    out of memory in its first updates.

    Args:
        fit: before a run; its module isn't placed.
        path: the checkpoint to resume from; None begins at the beginning.

    Returns:
        What the attempt that fitted into memory gave.

    Raises:
        torch.OutOfMemoryError: no candidate is left; the message lists those that were tried.
        Exception: whatever else ended the run.
    """
    assert fit.choice is not None
    if fit.choice.after_failure().chosen is None or not can_copy(fit):
        return fit.train_from(path)
    start, standing = Start(fit), Standing(fit.strategy, fit.run.stream)
    while True:
        try:
            ended: TrainOutput | OutOfMemory | ValueError = one_attempt(fit, path)
        except ValueError as error:
            # Nobody has played it; and a module that can't be placed so is refused on all ranks alike.
            if fit.placed or not fit.choice.is_bound(fit.choice.verdicts[0].figures.candidate):
                raise
            forget_frames(error)  # their variables hold tensors
            ended = error
        if isinstance(ended, TrainOutput):
            return ended
        choice, reason = follow(fit.choice, ended)
        start.take_back(fit)
        standing.restore(fit.strategy)
        if choice.chosen is None:
            fit.source.drop_copy()
            cause = ended.error if isinstance(ended, OutOfMemory) else ended
            raise torch.OutOfMemoryError(nothing_left(choice.failed, reason)) from cause
        failed = fit.choice.verdicts[0].figures.candidate
        said = next(each for each in choice.verdicts if each.figures.candidate == failed)
        fit.take_choice(choice)
        if fit.strategy.is_main:
            number = "" if said.number is None else f" {said.number:,} bytes"
            warnings.warn(
                f"strategy='auto': {failed.title} {said.sentence}{number}. The run begins again with "
                f"{choice.chosen.title}: {choice.chosen.python}. {reason}",
                stacklevel=3,
            )


def follow(choice: Choice, ended: OutOfMemory | ValueError) -> tuple[Choice, str]:
    """The choice after an attempt, and what the rank says that had no memory."""
    if isinstance(ended, OutOfMemory):
        return choice.after_failure(), ended.reason
    return choice.after_refusal(f"can't work: {' '.join(str(ended).split())}"), ""


def one_attempt(fit: Choosing, path: Path | None) -> TrainOutput | OutOfMemory:
    """Train under what is chosen now."""
    watching: list[FirstUpdates] = []

    def train(over: Callable[[], None]) -> TrainOutput:
        def all_are_over() -> None:
            fit.source.drop_copy()
            fit.callbacks.pop(watching[0])
            over()

        watching.append(FirstUpdates(all_are_over))
        fit.callbacks.add(watching[0])
        output = fit.train_from(path)
        fit.source.drop_copy()
        return output

    try:
        return attempt(fit, train, lambda: not watching or watching[0].done < UPDATES)
    finally:
        for each in watching:
            fit.callbacks.pop(each)


def can_copy(fit: Choosing) -> bool:
    """Copy the module, to begin again from; return whether all ranks could."""
    memory, why = look_here().host_memory, ""
    tensors = [*fit.module.parameters(), *fit.module.buffers()]
    needed = sum(each.nbytes for each in tensors if not each.is_meta)
    if memory is not None and needed > PART * memory:
        why = f"a copy of the module, of {needed:,} bytes, takes too much of the {memory:,} that a rank's host has"
    else:
        try:
            fit.source.keep_copy()
        except TypeError as error:
            why = str(error)
    reasons = [each for each in fit.strategy.gather(why) if each]
    if not reasons:
        return True
    fit.source.drop_copy()
    if fit.strategy.is_main:
        warnings.warn(
            f"strategy='auto': if the first update is out of memory, no other candidate takes over, since {reasons[0]}",
            stacklevel=4,
        )
    return False


def nothing_left(failed: list[Verdict], reason: str) -> str:
    """Say what was tried, and what to do."""
    tried = "; ".join(f"{each.figures.candidate.title} ({each.number:,} bytes by plan)" for each in reversed(failed))
    return (
        f"strategy='auto': no candidate is left. Out of memory in the first updates were: {tried}. {reason} What takes "
        "less memory: more ranks, a smaller per_device_train_batch_size with more gradient_accumulation_steps, a "
        "16-bit precision, shorter samples."
    )
