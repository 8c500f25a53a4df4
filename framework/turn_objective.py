"""TurnObjective: the loss contract for the loss of a turn, which goes through what wraps the module."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .module import TrainModule
from .objective import Count, Objective, differentiable, without_loss
from .rows import Rows
from .turns import Turn, listed


class TurnObjective(Objective):
    """Finds the loss of a turn: ``loss`` is given the model in the place of forward's outputs.

    Args:
        module: the user's module.
        turn: of the module.
        moved: the names of the parameters that it moves.
        rows: see Objective.
    """

    def __init__(self, module: TrainModule, turn: Turn, moved: Sequence[str], rows: Rows | None) -> None:
        super().__init__(module, rows=rows)
        self.turn, self.moved = turn, moved
        self.name = f"{type(module).__name__}.{getattr(turn.loss, '__name__', 'loss')}, the loss of turn {turn.name!r},"
        self.takes_num_items = "num_items_in_batch" in inspect.signature(turn.loss).parameters
        self.own_loss = self.through
        self.reaches = False
        self._is_empty = False

    def count(self, batch: Any) -> Count:
        """Count the items in the batch whose loss comes next, as the data gave it."""
        count = super().count(batch)
        self._is_empty = isinstance(count, int) and count == 0  # all padding, or a stand-in
        return count

    def through(self, model: nn.Module, batch: Any, **options: Any) -> Tensor | Mapping[str, Tensor]:
        """Compute the loss within a call of the model, so that its hooks run. The batch isn't handed through it: a
        wrapper would cast or move what is given, and labels with it.
        """
        find = self.find_without_items if self._is_empty else self.turn.loss
        self.module.call_once(partial(find, batch, **options))
        found: Tensor | Mapping[str, Tensor] = model()
        return found

    def find_without_items(self, batch: Any, **options: Any) -> Any:
        """Compute what stands for the loss of a batch without items; see ``without_loss``. It is the model's output, so
        that the hooks of what wraps the model run in backward, too.
        """
        with outputs_of_layers(self.module) as outputs:
            found = self.turn.loss(batch, **options)
        loss: Any = found.get("loss") if isinstance(found, Mapping) else found
        loss = without_loss(loss, [*outputs, *self.gathered])
        return {**found, "loss": loss} if isinstance(found, Mapping) and "loss" in found else loss

    def check(self, loss: Any) -> None:
        """Refuse a loss that can't be trained on; see ``Objective.check``."""
        if isinstance(loss, Tensor) and not loss.ndim and not loss.requires_grad:
            raise ValueError(self.unreached())
        super().check(loss)

    def check_reached(self, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse, after the first backward of the turn, a loss that doesn't reach what the turn moves.

        Raises:
            ValueError: no parameter has a gradient.
        """
        if all(parameter.grad is None for parameter in parameters):
            raise ValueError(self.unreached())
        self.reaches = True

    def unreached(self) -> str:
        """What to say of such a loss."""
        return (
            f"{self.name} doesn't reach what the turn moves: no gradient leads to {listed(self.moved)}. Compute it of "
            "what these give, without detach() or torch.no_grad() between; in a turn, nothing else gets a gradient."
        )


@contextmanager
def outputs_of_layers(module: nn.Module) -> Iterator[list[Tensor]]:
    """Gives what a module's layers return in here, as far as it carries a gradient."""
    found: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        found.extend(differentiable(outputs))

    handles = [layer.register_forward_hook(keep) for layer in module.modules() if layer is not module]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
