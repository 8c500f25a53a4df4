"""Checks of what a module's ``configure_optimizer`` and ``configure_scheduler`` return, where a run begins."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..arguments import FitArguments
from ..module import TrainModule
from ..optim.schedulers import waits_for_metric


def configured_optimizer(module: TrainModule, args: FitArguments) -> Optimizer:
    """Have the module make its optimizer, and check it.

    Raises:
        TypeError: the method returned something else; the message says what to return.
        ValueError: the optimizer steps tensors that aren't parameters of the module.
    """
    optimizer: Any = module.configure_optimizer(args)
    if isinstance(optimizer, Optimizer):
        own = {id(parameter) for parameter in module.parameters()}
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        foreign = [tuple(parameter.shape) for parameter in stepped if id(parameter) not in own]
        if foreign:
            shapes = ", ".join(map(str, foreign[:5]))
            raise ValueError(
                f"{type(module).__name__}.configure_optimizer returned an optimizer over tensors that are no "
                f"parameters of the module, of the shapes {shapes}. Give it self.parameters() there, where they are "
                "placed, and assign further parameters to the module in __init__."
            )
        return optimizer
    hint = ""
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        hint = f"That is a class: return {optimizer.__name__}(self.parameters(), lr=args.learning_rate). "
    elif isinstance(optimizer, tuple | list | dict):
        hint = (
            "Several optimizers are one with a group of parameters each: "
            "AdamW([{'params': self.body.parameters()}, {'params': self.head.parameters(), 'lr': 1e-4}]). A schedule "
            "is what configure_scheduler(self, optimizer, args) returns. "
        )
    elif optimizer is None:
        hint = "Its last line lacks a return? "
    raise TypeError(
        f"{type(module).__name__}.configure_optimizer must return one torch.optim.Optimizer, and returned "
        f"{describe(optimizer)}. {hint}Leave the method out, and optim='adamw' names one."
    )


def configured_scheduler(
    module: TrainModule, optimizer: Optimizer, args: FitArguments, has_evaluations: bool
) -> LRScheduler:
    """Have the module make its schedule, and check it.

    Args:
        module: its ``configure_scheduler`` is called.
        optimizer: the optimizer of the run.
        args: the arguments of the run.
        has_evaluations: whether the run evaluates.

    Raises:
        TypeError: the method returned something else; the message says what to return.
        ValueError: the schedule waits for a metric, and nothing is evaluated.
    """
    scheduler: Any = module.configure_scheduler(optimizer, args)
    verbs = ("step", "state_dict", "load_state_dict")
    if isinstance(scheduler, type) or not all(callable(getattr(scheduler, verb, None)) for verb in verbs):
        raise TypeError(
            f"{type(module).__name__}.configure_scheduler must return one schedule over the optimizer, e.g. a "
            f"torch.optim.lr_scheduler.LambdaLR (several after one another: a SequentialLR), and returned "
            f"{describe(scheduler)}. Leave the method out, and lr_scheduler_type='constant' keeps the learning rate."
        )
    if waits_for_metric(scheduler) and not has_evaluations:
        raise ValueError(
            f"{type(scheduler).__name__} is stepped with the metric of an evaluation, and the run has none. Pass "
            "eval_data= and eval_strategy='steps' (or 'epoch'), or return a schedule that is stepped without one."
        )
    return scheduler


def describe(value: Any) -> str:
    """Describe a value for an error message, by its type and what is in it."""
    if value is None:
        return "None"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing in it'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(item).__name__ for item in value)})"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
