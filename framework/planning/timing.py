"""Timing candidates: what an update takes, by a few that are made for it."""

import time
from typing import Any

import torch

from ..arguments import FitArguments
from ..callbacks import Callback
from ..state import Control, TrainState

WARMUP, TIMED = 2, 3  # updates: in the first ones the optimizer makes its state, and torch.compile its code
UPDATES = WARMUP + TIMED


class UpdateTimes(Callback):
    """Times the last updates of a run that is made for it.

    Attributes:
        seconds: that an update has taken on this rank; 0 before they are done.
    """

    def __init__(self) -> None:
        self.began = self.seconds = 0.0
        self.done = 0

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Wait for the device where the timed updates begin, and where they end."""
        self.done += 1
        if self.done in (WARMUP, UPDATES):
            wait_for_device()
            now = time.perf_counter()
            self.began, self.seconds = now, (now - self.began) / TIMED


def wait_for_device() -> None:
    """Wait until this rank's device has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
