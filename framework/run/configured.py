"""Checks of what a module's ``configure_optimizer`` and ``configure_scheduler`` return, where a run begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..arguments import FitArguments
from ..module import TrainModule
from ..optim.optimizers import make_optimizer
from ..optim.schedulers import waits_for_metric
from ..turns import Turns, listed


def configured_optimizer(module: TrainModule, args: FitArguments) -> Optimizer:
    """Have the module make its optimizer, and check it.

    Raises:
        TypeError: the method returned something else; the message says what to return.
        ValueError: the optimizer steps tensors that aren't parameters of the module.
    """
    return checked_optimizer(module, module.configure_optimizer(args))


def configured_optimizers(
    module: TrainModule, args: FitArguments, turns: Turns, moved: Mapping[str, Sequence[str]]
) -> dict[str, Optimizer]:
    """Have the module make the optimizer of each turn, or make those that the turns name.

    Args:
        module: placed.
        args: of the run.
        turns: of the module.
        moved: turn to the names of the parameters that it moves.

    Raises:
        TypeError: the method returned something else than a mapping of optimizers.
        ValueError: turns are missing in it, or an optimizer steps other parameters than its turn moves.
    """
    name = f"{type(module).__name__}.configure_optimizer"
    if type(module).configure_optimizer is TrainModule.configure_optimizer:
        return {turn.name: make_optimizer(module, turn.arguments(args), moved[turn.name]) for turn in turns}
    found = of_each_turn(name, module.configure_optimizer(args), turns)
    parameters = {id(parameter): name for name, parameter in module.named_parameters()}
    for turn, optimizer in found.items():
        checked_optimizer(module, optimizer)
        stepped = {parameters[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
        others, missing = sorted(stepped - {*moved[turn]}), sorted({*moved[turn]} - stepped)
        if others or missing:
            what = f"also steps {listed(others)}" if others else f"doesn't step {listed(missing)}"
            raise ValueError(
                f"{name}: the optimizer of turn {turn!r} {what}. It steps what the turn moves, no more and no less: "
                "freeze a parameter (requires_grad_(False)) that isn't to be trained."
            )
    return found


def of_each_turn(name: str, found: Any, turns: Turns) -> dict[str, Any]:
    """What a method of the module made for each turn.

    Args:
        name: of the method.
        found: what it returned.

    Raises:
        TypeError: it is no mapping.
        ValueError: its keys aren't the turns' names.
    """
    names = list(turns.turns)
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{name} must return a mapping from the names of the turns ({', '.join(names)}), and returned "
            f"{describe(found)}."
        )
    if set(found) != set(names):
        missing = [turn for turn in names if turn not in found]
        unknown = [str(key) for key in found if key not in names]
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has no turn for {', '.join(unknown)}"] * bool(
            unknown
        )
        raise ValueError(f"{name} returned a mapping that {' and '.join(what)}. The turns are {', '.join(names)}.")
    return {turn: found[turn] for turn in names}


def checked_optimizer(module: TrainModule, optimizer: Any) -> Optimizer:
    """Check what ``configure_optimizer`` returned, or what it returned for a turn; see ``configured_optimizer``."""
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
            "AdamW([{'params': self.body.parameters()}, {'params': self.head.parameters(), 'lr': 1e-4}]). Several that "
            "move parts of the module by losses of their own are turns: write turns(self), see docs/turns.md. A "
            "schedule is what configure_scheduler(self, optimizer, args) returns. "
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
    return checked_scheduler(module, module.configure_scheduler(optimizer, args), has_evaluations)


def configured_schedulers(
    module: TrainModule,
    optimizers: Mapping[str, Optimizer],
    args: FitArguments,
    turns: Turns | None,
    has_evaluations: bool,
) -> dict[str, LRScheduler]:
    """The schedule of each turn; of a module without turns, the schedule by the name "". See ``configured_scheduler``.

    Args:
        optimizers: by the same names.
    """
    if turns is None:
        return {"": configured_scheduler(module, optimizers[""], args, has_evaluations)}
    if type(module).configure_scheduler is TrainModule.configure_scheduler:
        return {
            turn.name: configured_scheduler(module, optimizers[turn.name], turn.arguments(args), has_evaluations)
            for turn in turns
        }
    name = f"{type(module).__name__}.configure_scheduler"
    found = of_each_turn(name, module.configure_scheduler(dict(optimizers), args), turns)
    return {turn: checked_scheduler(module, schedule, has_evaluations) for turn, schedule in found.items()}


def checked_scheduler(module: TrainModule, scheduler: Any, has_evaluations: bool) -> LRScheduler:
    """Check what ``configure_scheduler`` returned, or what it returned for a turn; see ``configured_scheduler``."""
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
