"""LOMO and AdaLOMO, which update a parameter in backward as soon as its gradient is there, and free the gradient."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...strategies.base import Strategy
from ..fields.argument_fields import ArgumentFields


class UpdatesInBackward(Optimizer):
    """The base of LOMO and AdaLOMO: between ``train()`` and ``eval()``, a backward consumes gradients one by one.

    A gradient lives only from the moment when it is complete to the update of its parameter, so that no more than one
    is in memory. Each update reads the learning rate from its group. ``step()`` has nothing left to do.

    Args:
        params: parameters or groups of them.
        defaults: options of a group.
    """

    updates_in_backward = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.handles: list[RemovableHandle] = []

    def train(self) -> None:
        """Have a backward update parameters from here on."""
        if not self.handles:
            self.handles = [
                parameter.register_post_accumulate_grad_hook(partial(self._consume, index))
                for index, group in enumerate(self.param_groups)
                for parameter in group["params"]
            ]

    def eval(self) -> None:
        """Have a backward accumulate gradients, as usual, from here on."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @torch.no_grad()
    def _consume(self, index: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None, "the hook follows the accumulation"
        wide = torch.promote_types(parameter.dtype, torch.float32)
        updated = parameter.to(wide)  # the parameter itself where it is float32 already
        self.update(updated, gradient.to(wide), self.state[parameter], self.param_groups[index])
        if updated is not parameter:
            parameter.copy_(updated)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update a parameter in place.

        Args:
            parameter: in float32 or wider.
            gradient: in the same dtype; may be changed.
            state: what is remembered of this parameter; empty before its first update.
            group: the options of its group, with the learning rate of this update as "lr".
        """
        raise NotImplementedError

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing: backward has made the updates."""
        assert closure is None, "a closure's backward would update each time it is called"


class Lomo(UpdatesInBackward):
    """LOMO (Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", 2023): stochastic
    gradient descent in backward, without any state.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        weight_decay: each update takes lr times this part of a parameter away.
        clip_grad_value: entries of gradients are cut to this size; None leaves them.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> optimizer = Lomo(model.parameters(), lr=0.01)
        >>> optimizer.train()
        >>> model(x).square().mean().backward()  # the parameters have moved, and hold no gradients
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        clip_grad_value: float | None = None,
    ) -> None:
        if clip_grad_value is not None and clip_grad_value <= 0:
            raise ValueError(f"clip_grad_value must be above 0, or None. Received: {clip_grad_value}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "clip_grad_value": clip_grad_value})

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Make a step of gradient descent."""
        if group["clip_grad_value"] is not None:
            gradient.clamp_(-group["clip_grad_value"], group["clip_grad_value"])
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(gradient, alpha=group["lr"])


class AdaLomo(UpdatesInBackward):
    """AdaLOMO (Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate", 2023): in backward, with the
    second moment of a matrix kept as one number for each row and column, and updates in proportion to the parameter.

    Args:
        params: parameters or groups of them.
        lr: learning rate, relative to the root mean square of each parameter.
        weight_decay: each update takes its step size times this part of a parameter away.
        eps: what is added to squared gradients, and the least root mean square that a parameter is taken to have.
        clip_threshold: the largest root mean square of an update before it is scaled.
        decay_rate: in update t the new squares have a weight of t^decay_rate in their running mean.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "eps": tuple(eps)}
        super().__init__(params, {**defaults, "clip_threshold": clip_threshold, "decay_rate": decay_rate})

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Make a step whose size is relative to that of the parameter."""
        shape, is_matrix = parameter.shape, parameter.ndim > 1
        if not state:
            shapes = {"row": shape[:-1], "column": shape[:-2] + shape[-1:]} if is_matrix else {"square": shape}
            state.update({name: gradient.new_zeros(size) for name, size in shapes.items()}, step=0)
        state["step"] += 1
        forgets = state["step"] ** group["decay_rate"]
        square = gradient.square().add_(group["eps"][0])
        if is_matrix:
            row = state["row"].lerp_(square.mean(-1), forgets)
            column = state["column"].lerp_(square.mean(-2), forgets)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
        else:
            scale = state["square"].lerp_(square, forgets).rsqrt()
        change = gradient.mul_(scale)
        change /= (root_mean_square(change) / group["clip_threshold"]).clamp_(min=1.0)
        step_size = group["lr"] * root_mean_square(parameter).clamp_(min=group["eps"][1])
        parameter.mul_(1.0 - step_size * group["weight_decay"]).sub_(change.mul_(step_size))


def root_mean_square(tensor: Tensor) -> Tensor:
    """Return the root mean square of a tensor, 0-dim, on its device."""
    return tensor.norm() / tensor.numel() ** 0.5


def check_update_in_backward(optimizer: str, strategy: Strategy, args: ArgumentFields) -> None:
    """Refuse a run in which backward makes gradients that aren't ready for an update at once.

    Args:
        optimizer: the name of the optimizer, for the message.
        strategy: set up, with the precision of the run.
        args: of the run.

    Raises:
        ValueError: the message says what can't work and what to write instead.
    """
    problems = [why for _, why in argument_problems(args)]
    if not strategy.gradients_are_final_in_backward:
        problems.append(
            f"under strategy={strategy.name!r} they are summed over ranks or scattered after that: use "
            "strategy='single', or optim='lion', which keeps one moment"
        )
    if strategy.precision.scales_loss:
        problems.append(
            f"in precision={strategy.precision.name!r} they are scaled and may overflow: use 'bf16-mixed' or '32-true'"
        )
    if problems:
        raise ValueError(f"{optimizer} consumes gradients in backward. " + "; ".join(problems) + ".")


def argument_problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (argument, why it can't work with updates in backward) for arguments that can't work."""
    found = []
    if args.max_grad_norm:
        found.append(
            (
                "max_grad_norm",
                "LOMO and AdaLOMO update a parameter before the norm of all gradients is known; set max_grad_norm=0 "
                "(AdaLOMO bounds each update; LOMO takes optim_args={'clip_grad_value': ...})",
            )
        )
    if args.gradient_accumulation_steps > 1 or args.gradient_accumulation_schedule:
        found.append(
            (
                "gradient_accumulation_steps",
                "LOMO and AdaLOMO update with every backward, so nothing accumulates; set it to 1 and raise "
                "per_device_train_batch_size",
            )
        )
    if args.contrastive_chunks is not None:
        found.append(
            (
                "contrastive_chunks",
                "LOMO and AdaLOMO update with every backward, and each piece has one; leave it out, or use "
                "optim='lion'",
            )
        )
    if args.nonfinite_updates == "raise":
        found.append(
            (
                "nonfinite_updates",
                "LOMO and AdaLOMO have updated most parameters before the last gradient is known; leave it out, or use "
                "debug='underflow_overflow', which ends the run in the forward",
            )
        )
    return found


def updates_in_backward(optimizer: Optimizer) -> bool:
    """Whether backward makes the updates of an optimizer, or of a part of it."""
    return any(getattr(part, "updates_in_backward", False) for part in getattr(optimizer, "parts", [optimizer]))
