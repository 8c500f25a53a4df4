"""Training and evaluation, for optimizers that tell them apart."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


class OptimizerMode:
    """Calls ``train()`` and ``eval()`` of an optimizer that has them; does nothing for one that hasn't.

    A schedule-free optimizer computes gradients at other weights than those it is judged by (Defazio et al., 2024), and
    swaps them; LOMO updates in backward only while it trains.

    Args:
        optimizer: None where nothing is trained.
        weights_have_changed: called after a swap.

    Attributes:
        trains: which of the two it was told last.
    """

    def __init__(self, optimizer: Optimizer | None, weights_have_changed: Callable[[], None]) -> None:
        self._optimizer: Any = optimizer
        self._switches = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
        self.trains = False
        self._weights_have_changed = weights_have_changed

    def train(self) -> None:
        """The module holds the weights that gradients are computed at."""
        self.trains = True
        if self._switches:
            self._optimizer.train()
            self._weights_have_changed()

    def eval(self) -> None:
        """The module holds the weights to evaluate, to save and to use."""
        self.trains = False
        if self._switches:
            self._optimizer.eval()
            self._weights_have_changed()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation's weights inside, and what there was before after it."""
        trains = self.trains
        self.eval()
        try:
            yield
        finally:
            if trains:
                self.train()
