"""Counters: the number of the update and the epoch, which a module reads in forward and loss as tensors."""

import torch
from torch import Tensor, nn

from ..strategies.base import Strategy
from .of_modules import OfModules, check_no_replica

NAMES = {"update_number": torch.int64, "epoch": torch.float32}


class Counters:
    """Progress in two 0-dim tensors on the device, which change in place between two updates.

    A number would be another program for torch.compile in each update, and a buffer of the module would be saved,
    broadcast and compared. Nothing is filled in an update before something has read a counter.

    Args:
        strategy: set up.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.update_number, self.epoch = (
            torch.zeros((), dtype=dtype, device=strategy.device) for dtype in NAMES.values()
        )
        self.now: tuple[float, float] = (0, 0.0)
        self.is_read = False

    def begin(self, global_step: int, epoch: float, compiles: bool) -> None:
        """Stand where a run begins or goes on.

        Args:
            global_step, epoch: of the run's state.
            compiles: whether modules are compiled, so that what reads a counter first may not be seen to.
        """
        self.now, self.is_read = (global_step, epoch), self.is_read or compiles
        self.fill()

    def follow(self, global_step: int, epoch: float) -> None:
        """Take the run's state after an update."""
        self.now = global_step, epoch
        if self.is_read:
            self.fill()

    def fill(self) -> None:
        """Bring the tensors up to date, without a wait."""
        with torch.no_grad():
            for counter, value in zip((self.update_number, self.epoch), self.now, strict=True):
                counter.fill_(self.strategy.factor(value))

    def read(self, name: str) -> Tensor:
        """Return a counter. torch.compile can look inside."""
        if torch.compiler.is_compiling():
            self.is_read = True
        elif not self.is_read:
            self.is_read = True
            self.fill()
        return self.update_number if name == "update_number" else self.epoch


COUNTERS: OfModules[Counters] = OfModules()


def read_counter(module: nn.Module, name: str) -> Tensor:
    """Return a counter of the run that trains a module; 0 where no Fit has it."""
    counters = COUNTERS.get(module)
    if counters is not None:
        return counters.read(name)
    if not torch.compiler.is_compiling():
        check_no_replica(module, name)
    return torch.zeros((), dtype=NAMES[name])
