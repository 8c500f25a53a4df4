"""Optimizers that evaluate the loss several times in a step (LBFGS): a closure over the update's micro-batches."""

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..strategies.base import Strategy
from .arguments import FitArguments

if TYPE_CHECKING:
    from .fit import Fit
    from .objective import Count


class Closure:
    """Hands such an optimizer a function that computes the update's loss and gradients anew.

    The first call in a step costs nothing: it gives what the loop has just computed.

    Args:
        fit: placed; its optimizer needs a closure.
    """

    def __init__(self, fit: "Fit") -> None:
        self.fit = fit
        self.known: Tensor | None = None
        fit.optimizer.register_step_pre_hook(self.hand_over)

    def hand_over(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Called before each step: its arguments, with the closure."""
        return args, {**kwargs, "closure": self.evaluate}

    def begin_update(self, micro_batches: list[Any], num_items: "Count | None", loss: Tensor) -> None:
        """Note what the next step is about.

        Args:
            micro_batches: of the update.
            num_items: in all of them; see Fit.get_batch_samples.
            loss: their mean loss, whose gradients the parameters have.
        """
        self.micro_batches, self.num_items, self.known = micro_batches, num_items, loss

    def evaluate(self) -> Tensor:
        """The mean loss over the update's items at the weights as they are; gradients are those of this loss."""
        if self.known is not None:
            known, self.known = self.known, None
            return known
        fit, strategy = self.fit, self.fit.strategy
        strategy.weights_have_changed()
        fit.optimizer.zero_grad()
        total: Tensor | None = None
        with fit.averages.paused():  # the update's items were counted once
            for left, inputs in zip(range(len(self.micro_batches) - 1, -1, -1), self.micro_batches, strict=True):
                with strategy.accumulate(last=left == 0):
                    loss = fit.training_step(strategy.model, inputs, self.num_items)
                total = loss if total is None else total + loss
        strategy.prepare_gradients()
        assert total is not None
        return total


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` can't be called without a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def closure_for(fit: "Fit") -> Closure | None:
    """A closure for an optimizer that needs one; None for all others."""
    return Closure(fit) if needs_closure(fit.optimizer) else None


def check_closure(optimizer: Optimizer, strategy: Strategy, args: FitArguments) -> None:
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
