"""Counters: the number of the update and the epoch, which a module reads in forward and loss as tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"update_number": torch.int64, "epoch": torch.float32}


class Counters:
    """Progress in two tensors of one number on the device, which change in place between two updates.

    A number would be another program for torch.compile in each update, and a buffer of the module would be saved,
    broadcast and compared. Nothing is filled in an update before something has read a counter.

    Args:
        device: of the module.
    """

    def __init__(self, device: torch.device) -> None:
        # Under XLA, a 0-dim tensor, or one that a device makes, would be an instruction of the first update's program
        # and of no other's, so that one more had to be compiled. What was moved there is an input.
        self.update_number, self.epoch = (torch.zeros(1, dtype=dtype).to(device) for dtype in DTYPES.values())
        self.now: tuple[float, float] = (0, 0.0)
        self.is_read = False

    def begin(self, global_step: int, epoch: float, compiles: bool) -> None:
        """Stand where a run begins or goes on.

        Args:
            global_step, epoch: of the run's state.
            compiles: whether modules are compiled, so that what reads a counter first may not be seen to.
        """
        self.now, self.is_read = (global_step, epoch), self.is_read or compiles
        if self.is_read:
            self.fill()

    def follow(self, global_step: int, epoch: float, factor: Callable[[float], float | Tensor]) -> None:
        """Take the run's state after an update.

        Args:
            global_step, epoch: of the run's state.
            factor: ``Strategy.factor``, which isn't asked before something has read a counter.
        """
        self.now = global_step, epoch
        if self.is_read:
            self.fill(factor)

    def fill(self, factor: Callable[[float], float | Tensor] = float) -> None:
        """Bring the tensors up to date, without a wait."""
        for counter, value in zip((self.update_number, self.epoch), self.now, strict=True):
            counter.fill_(factor(value))

    def read(self, name: str) -> Tensor:
        """Return a counter. torch.compile can look inside."""
        if torch.compiler.is_compiling():
            self.is_read = True
        elif not self.is_read:
            self.is_read = True
            self.fill()
        return (self.update_number if name == "update_number" else self.epoch)[0]
