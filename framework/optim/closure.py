"""Optimizers that evaluate the loss several times in a step (LBFGS): a closure over the update's micro-batches."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ...strategies.base import Strategy
from ..fields.argument_fields import ArgumentFields


class Closure:
    """Hands an optimizer a function that computes the update's loss and gradients anew.

    The first call in a step costs nothing: it gives what the loop has just computed.

    Args:
        optimizer: needs a closure.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._known: Tensor | None = None
        self._compute_again: Callable[[], Tensor] | None = None
        optimizer.register_step_pre_hook(self.hand_over)

    def hand_over(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Add the closure to the arguments of a step. torch calls this before each."""
        return args, {**kwargs, "closure": self.evaluate}

    def begin_update(self, loss: Tensor, compute_again: Callable[[], Tensor]) -> None:
        """Note what the next step is about.

        Args:
            loss: the update's mean loss, whose gradients the parameters have.
            compute_again: computes that loss and its gradients at the weights as they are then.
        """
        self._known, self._compute_again = loss, compute_again

    def evaluate(self) -> Tensor:
        """The mean loss over the update's items at the weights as they are; gradients are those of this loss."""
        if self._known is not None:
            known, self._known = self._known, None
            return known
        assert self._compute_again is not None
        return self._compute_again()


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` can't be called without a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def check_closure(optimizer: Optimizer, strategy: Strategy, args: ArgumentFields) -> None:
    """Refuse an optimizer that needs a closure where the closure's loss wouldn't be that of the gradients.

    Raises:
        ValueError: says why, and what works.
    """
    if not needs_closure(optimizer):
        return
    name, precision = type(optimizer).__name__, strategy.precision
    begins = f"{name} evaluates the loss several times in a step"
    if not strategy.takes_closure:
        raise ValueError(
            f"{begins}, and under strategy={strategy.name!r} each rank would decide by its own. Use strategy='single', "
            "or optim='adamw'."
        )
    if precision.scales_loss or precision.master_weights:
        why = "scales the loss" if precision.scales_loss else "steps on float32 copies of the weights"
        raise ValueError(
            f"{begins} at weights that it moves, and precision={precision.name!r} {why}. Use precision='32-true', or "
            "'bf16-mixed'."
        )
    if args.max_grad_norm:
        raise ValueError(
            f"{begins}, and a clipped gradient (max_grad_norm={args.max_grad_norm}) isn't the gradient of that loss. "
            "Write max_grad_norm=0."
        )
    if args.past_index >= 0:
        raise ValueError(
            f"{begins}, and past_index={args.past_index} would hand each evaluation what the one before left. Leave it "
            "out, or use optim='adamw'."
        )
