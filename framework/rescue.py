"""save_on_exception: the last whole state of a run, saved as a checkpoint before an exception goes on."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

from . import random_state
from .batch_size import is_out_of_memory
from .printing import say

if TYPE_CHECKING:
    from .fit import Fit

SECONDS = 10.0  # that a rank which failed waits for the others to fail too


class RescueWarning(UserWarning):
    """A run that ends with an exception could not be saved."""


class Rescue:
    """Knows whether a run stands between two updates and, where it is asked to, saves it there.

    Weights, moments and counters are those of the last update until the next one begins to compute. Only the data and
    the random numbers have gone on when reading the next micro-batches fails; so where they stood is noted before.

    Args:
        is_on: whether a state is to be saved.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.is_whole = False  # and other than at the beginning of this run
        self.saved_step = -1
        self.standing: tuple[dict[str, Any], dict[str, Any]] | None = None  # data and random state, since moved on

    def stand(self, fit: "Fit") -> None:
        """Note where the data and the random numbers stand, before the next are read."""
        if self.is_on:
            self.standing = fit.stream.state_dict(), {**random_state.capture(), **fit.strategy.random_state()}

    def begin_update(self) -> None:
        """From here on there is no whole state."""
        self.is_whole = False

    def end_update(self) -> None:
        """Here is one again."""
        self.is_whole, self.standing = True, None

    def saved(self, step: int) -> None:
        """There is a checkpoint of this update."""
        self.saved_step = step

    def save(self, fit: "Fit", error: BaseException) -> None:
        """Save the state between two updates, where an exception met the run there, on all ranks. Doesn't raise: that
        exception is the one to show.
        """
        from .checkpoint import CheckpointError

        step = fit.state.global_step
        if not self.is_on or not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return  # what can't be written needn't be tried again
        if fit.args.auto_find_batch_size and is_out_of_memory(error):
            return  # the run may begin again with a smaller batch
        if not self.is_whole or self.saved_step == step:
            if not self.is_whole and step:
                self.warn(f"it came in the middle of update {step + 1}, or before the first one of this run.")
            return
        if not fit.strategy.all_say(f"update {step}", SECONDS):
            self.warn(f"rank {fit.strategy.rank} failed after update {step}, and not every other rank did within "
                      f"{SECONDS:.0f} s. A checkpoint is written by all together.")  # fmt: skip
            return
        try:
            if self.standing is not None:
                data, random = self.standing
                fit.stream.load_state_dict(data)
                random_state.restore(random)
                fit.strategy.restore_random_state(random)
            path = fit.save_checkpoint()
            fit.close_writer()
        except Exception as failure:
            self.warn(f"saving failed ({type(failure).__name__}: {failure}).")
            return
        if fit.strategy.is_main:
            say(f"{type(error).__name__} after update {step}: the run was saved as {path}.", sys.stderr)

    def warn(self, why: str) -> None:
        """Say why nothing was saved."""
        warnings.warn(f"The exception that ends this run left no checkpoint: {why}", RescueWarning, stacklevel=4)
