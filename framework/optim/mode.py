"""The mode of optimizers that tell training and evaluation apart."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


class OptimizerMode:
    """Calls ``train()`` and ``eval()`` of an optimizer that has them, and does nothing for other optimizers.

    A schedule-free optimizer computes gradients at other weights than those that it is judged by (Defazio et al.,
    2024), and swaps the two. LOMO updates in backward only in training.

    Args:
        optimizer: None where nothing is trained.
        weights_have_changed: called after weights were swapped.

    Attributes:
        trains: whether the optimizer is in training mode.
    """

    def __init__(self, optimizer: Optimizer | None, weights_have_changed: Callable[[], None]) -> None:
        self._optimizer: Any = optimizer
        self._switches = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
        self.trains = False
        self._weights_have_changed = weights_have_changed

    def train(self) -> None:
        """Put into the module the weights at which gradients are computed."""
        self.trains = True
        if self._switches:
            self._optimizer.train()
            self._weights_have_changed()

    def eval(self) -> None:
        """Put into the module the weights to evaluate, to save and to use."""
        self.trains = False
        if self._switches:
            self._optimizer.eval()
            self._weights_have_changed()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Entered around an evaluation or a save: evaluation mode inside, and the mode before it afterwards."""
        trains = self.trains
        self.eval()
        try:
            yield
        finally:
            if trains:
                self.train()
