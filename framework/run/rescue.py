"""save_on_exception: the last whole state of a run, saved as a checkpoint before an exception goes on."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...strategies.base import Strategy
from .. import random_state
from ..data import DataStream
from ..printing import say
from .out_of_memory import is_out_of_memory

SECONDS = 10.0  # that a rank which failed waits for the others to fail too


class RescueWarning(UserWarning):
    """A run that ends with an exception could not be saved."""


class Rescue:
    """Knows whether a run stands between two updates, and saves it there.

    Weights, moments and counters are those of the last update until the next one begins to compute. Only the data and
    the random numbers have gone on when reading the next micro-batches fails; so where they stood is noted before.

    Args:
        strategy: of the run.
        stream: the run's data.
        begins_again: whether a run that is out of memory begins again, and needn't be saved.
    """

    def __init__(self, strategy: Strategy, stream: DataStream, begins_again: bool) -> None:
        self.strategy, self.stream, self.begins_again = strategy, stream, begins_again
        self.is_whole = False  # and other than at the beginning of this run
        self.saved_step = -1
        self.standing: tuple[dict[str, Any], Any, dict[str, Any]] | None = None  # data and random state, since moved on

    def note_position(self) -> None:
        """Note where the data and the random numbers stand, before the next are read."""
        random = {**random_state.capture(), **self.strategy.random_state()}
        self.standing = self.stream.state_dict(), self.stream.own_state(), random

    def begin_update(self) -> None:
        """Note that there is no whole state from here on."""
        self.is_whole = False

    def end_update(self) -> None:
        """Note that the state is whole again."""
        self.is_whole, self.standing = True, None

    def note_saved(self, step: int) -> None:
        """Note that there is a checkpoint of this update."""
        self.saved_step = step

    def save(self, error: BaseException, step: int, save: Callable[[], Path]) -> None:
        """Save the state between two updates, where an exception met the run there, on all ranks. Doesn't raise: that
        exception is the one to show.

        Args:
            error: the exception.
            step: updates done.
            save: writes the checkpoint, and returns when it is there.
        """
        from ..checkpoint import CheckpointError

        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return  # what can't be written needn't be tried again
        if self.begins_again and is_out_of_memory(error):
            return
        if not self.is_whole or self.saved_step == step:
            if not self.is_whole and step:
                self.warn(f"it came in the middle of update {step + 1}, or before the first one of this run.")
            return
        if not self.strategy.all_say(f"update {step}", SECONDS):
            self.warn(f"rank {self.strategy.rank} failed after update {step}, and not every other rank did within "
                      f"{SECONDS:.0f} s. A checkpoint is written by all together.")  # fmt: skip
            return
        try:
            if self.standing is not None:
                data, own, random = self.standing
                self.stream.load_state_dict(data)
                self.stream.load_own_state(own)
                random_state.restore(random)
                self.strategy.restore_random_state(random)
            path = save()
        except Exception as failure:
            self.warn(f"saving failed ({type(failure).__name__}: {failure}).")
            return
        if self.strategy.is_main:
            say(f"{type(error).__name__} after update {step}: the run was saved as {path}.", sys.stderr)

    def warn(self, why: str) -> None:
        """Say why nothing was saved."""
        warnings.warn(f"The exception that ends this run left no checkpoint: {why}", RescueWarning, stacklevel=4)
