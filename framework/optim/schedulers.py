"""Learning-rate schedules by name: functions of the update to a factor on the peak."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ...precision.names import did_you_mean
from ..fields.argument_fields import ArgumentFields
from .greedy import GreedyLR

# (update, warm-up updates, all updates, **options) -> factor on learning_rate
Shape = Callable[..., float]


def rise(update: int, warmup_steps: int) -> float:
    """Rise from 0 to 1 over ``warmup_steps`` updates, then stay at 1."""
    return min(1.0, update / warmup_steps) if warmup_steps else 1.0


def done(update: int, warmup_steps: int, total: int) -> float:
    """Return how much of the run after warm-up is done, from 0 to 1."""
    return min(1.0, max(0, update - warmup_steps) / max(1, total - warmup_steps))


def half_cosine(fraction: float) -> float:
    """Fall from 1 at fraction 0 to 0 at fraction 1, in half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * fraction))


def waves(fraction: float, num_cycles: float, lowest: float = 0.0) -> float:
    """Go through ``num_cycles`` cosines from 1 down to ``lowest`` and back; 0.5 of one ends at ``lowest``."""
    return max(0.0, lowest + (1.0 - lowest) * half_cosine(2.0 * num_cycles * fraction))


def constant(update: int, warmup_steps: int, total: int) -> float:
    """Stay at 1."""
    return 1.0


def constant_with_warmup(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then 1."""
    return rise(update, warmup_steps)


def linear(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then a straight line to 0 at the end."""
    return rise(update, warmup_steps) * (1.0 - done(update, warmup_steps, total))


def cosine(update: int, warmup_steps: int, total: int, *, num_cycles: float = 0.5) -> float:
    """Linear warm-up, then ``num_cycles`` cosines, half of one to 0 (Loshchilov and Hutter, 2017)."""
    return rise(update, warmup_steps) * waves(done(update, warmup_steps, total), num_cycles)


def cosine_with_restarts(update: int, warmup_steps: int, total: int, *, num_cycles: int = 1) -> float:
    """Linear warm-up, then ``num_cycles`` half cosines, each from 1 to 0."""
    fraction = done(update, warmup_steps, total)
    return 0.0 if fraction >= 1.0 else rise(update, warmup_steps) * half_cosine((num_cycles * fraction) % 1.0)


def cosine_with_min_lr(
    update: int, warmup_steps: int, total: int, *, min_lr_rate: float = 0.1, num_cycles: float = 0.5
) -> float:
    """Linear warm-up, then half a cosine to ``min_lr_rate`` of the peak."""
    if update < warmup_steps:
        return rise(update, warmup_steps)
    return waves(done(update, warmup_steps, total), num_cycles, min_lr_rate)


def cosine_warmup_with_min_lr(
    update: int,
    warmup_steps: int,
    total: int,
    *,
    min_lr_rate: float = 0.1,
    warmup_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> float:
    """``cosine_with_min_lr``, one update ahead: the first update of the warm-up has ``warmup_lr_rate`` of the peak
    (default: 1 / ``warmup_steps``), the last update of the warm-up the peak, and the last of the run the lowest rate.
    """
    if update < warmup_steps:
        if warmup_lr_rate is None:
            return (update + 1.0) / warmup_steps
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * update / max(1, warmup_steps - 1)
    return waves((update - warmup_steps + 1) / max(1, total - warmup_steps), num_cycles, min_lr_rate)


def polynomial(update: int, warmup_steps: int, total: int, *, power: float = 1.0, lr_end_rate: float = 0.0) -> float:
    """Linear warm-up, then (1 - fraction of the run) to the ``power``, ending at ``lr_end_rate`` of the peak."""
    if update < warmup_steps:
        return rise(update, warmup_steps)
    return lr_end_rate + (1.0 - lr_end_rate) * (1.0 - done(update, warmup_steps, total)) ** power


def inverse_sqrt(update: int, warmup_steps: int, total: int, *, timescale: int | None = None) -> float:
    """Linear warm-up, then the inverse square root of the update (Vaswani et al., 2017), without an end.

    ``timescale`` (default: the warm-up, or 10,000 without one) is the update at which an unshifted curve would be 1.
    """
    scale = timescale or warmup_steps or 10_000
    return rise(update, warmup_steps) if update < warmup_steps else ((update + scale - warmup_steps) / scale) ** -0.5


RISES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda fraction: fraction,
    "cosine": lambda fraction: 1.0 - half_cosine(fraction),
    "1-sqrt": lambda fraction: 1.0 - math.sqrt(1.0 - fraction),
}


def warmup_stable_decay(
    update: int,
    warmup_steps: int,
    total: int,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    min_lr_rate: float = 0.0,
    min_lr_ratio: float | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    num_cycles: float = 0.5,
) -> float:
    """Warm-up, then 1, then a decay to ``min_lr_rate`` over the last ``num_decay_steps`` (Hu et al., 2024), or after
    ``num_stable_steps`` where they are given. ``min_lr_ratio`` is the end, and also where the warm-up begins.
    """
    lowest = min_lr_rate if min_lr_ratio is None else min_lr_ratio
    if update < warmup_steps:
        first = min_lr_ratio or 0.0
        return first + (1.0 - first) * RISES[warmup_type](update / warmup_steps)
    decay_begins = total - num_decay_steps if num_stable_steps is None else warmup_steps + num_stable_steps
    fraction = max(0, update - decay_begins) / num_decay_steps
    if fraction >= 1.0:
        return lowest
    if decay_type == "cosine":
        return waves(fraction, num_cycles, lowest)
    return lowest + (1.0 - lowest) * (1.0 - fraction if decay_type == "linear" else 1.0 - math.sqrt(fraction))


PLATEAU, GREEDY = "reduce_lr_on_plateau", "greedy"
ON_METRIC: Mapping[str, Callable[..., LRScheduler]] = {PLATEAU: ReduceLROnPlateau, GREEDY: GreedyLR}
"""Schedules that are stepped with the metric of an evaluation."""

SHAPES: Mapping[str, Shape] = {
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "cosine_with_min_lr": cosine_with_min_lr,
    "cosine_warmup_with_min_lr": cosine_warmup_with_min_lr,
    "polynomial": polynomial,
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "inverse_sqrt": inverse_sqrt,
    "warmup_stable_decay": warmup_stable_decay,
}
SCHEDULERS = (*SHAPES, *ON_METRIC)
WITHOUT_WARMUP = ("constant", *ON_METRIC)

# Options that are learning rates, to the option of the shape that is the same learning rate as a part of the peak.
AS_RATES: Mapping[str, Mapping[str, str]] = {
    "cosine_with_min_lr": {"min_lr": "min_lr_rate"},
    "cosine_warmup_with_min_lr": {"min_lr": "min_lr_rate"},
    "polynomial": {"lr_end": "lr_end_rate"},
}
COUNTS = (
    "num_decay_steps",
    "num_stable_steps",
    "timescale",
)  # options that are whole numbers, by which something is divided
WORDS: Mapping[str, tuple[str, ...]] = {"warmup_type": tuple(RISES), "decay_type": tuple(RISES)}


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) for every field of the schedule that can't work."""
    found: list[tuple[str, str]] = []
    name, options = args.lr_scheduler_type, args.lr_scheduler_kwargs

    def require(field: str, holds: bool, why: str) -> None:
        if not holds:
            found.append((field, why))

    require("lr_scheduler_type", name in SCHEDULERS, did_you_mean(name, SCHEDULERS))
    if name in SCHEDULERS:
        problem = options_problem(name, options, args.learning_rate)
        require("lr_scheduler_kwargs", problem is None, str(problem))
    require(
        "lr_scheduler_type",
        name not in ON_METRIC or args.eval_strategy != "no",
        "steps on an evaluation's metric; set eval_strategy to 'steps' or 'epoch'",
    )
    is_count = args.warmup_steps < 1 or float(args.warmup_steps).is_integer()
    require("warmup_steps", is_count, "must be a number of updates, or a fraction of the run below 1")
    require("warmup_ratio", 0 <= args.warmup_ratio <= 1, "is a fraction of the run, from 0 to 1")
    require(
        "warmup_ratio",
        not (args.warmup_ratio and args.warmup_steps),
        f"says the same as warmup_steps={args.warmup_steps}; give one of them",
    )
    for field in ("warmup_steps", "warmup_ratio"):
        require(
            field,
            name not in WITHOUT_WARMUP or not getattr(args, field),
            f"has no effect with lr_scheduler_type={name!r}; constant_with_warmup has one",
        )
    if args.max_steps > 0 and is_count:
        require(
            "warmup_steps",
            args.warmup_steps <= args.max_steps,
            f"is longer than the run (max_steps={args.max_steps}): the learning rate would never reach its peak",
        )
        decay, warmup = options.get("num_decay_steps"), warmup_updates(args, args.max_steps)
        require(
            "lr_scheduler_kwargs",
            type(decay) is not int or warmup + decay <= args.max_steps,
            f"{warmup} updates of warm-up and {decay} of decay are more than the run's {args.max_steps}; give fewer",
        )
    return found


@cache
def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Return the options that a schedule takes, by name."""
    made_by: Callable[..., Any] = ON_METRIC.get(name) or SHAPES[name]
    parameters = inspect.signature(made_by).parameters.values()
    taken = {p.name: p for p in parameters if name in ON_METRIC or p.kind is p.KEYWORD_ONLY}
    taken.pop("optimizer", None)
    return taken


def options_problem(name: str, options: Mapping[str, Any], peak: float) -> str | None:
    """Return why a schedule can't take these options, or None where it can."""
    taken, rates = options_of(name), AS_RATES.get(name, {})
    known = [*taken, *rates]
    unknown = [option for option in options if option not in known]
    missing = [p.name for p in taken.values() if p.default is p.empty and p.name not in options]
    if unknown:
        return f"{name} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
    if missing:
        return f"{name} needs {', '.join(missing)}"
    if name in ON_METRIC:
        return None
    for option, value in options.items():
        if option in WORDS:
            if value not in WORDS[option]:
                return f"{option} is one of {', '.join(map(repr, WORDS[option]))}"
        elif option in COUNTS or (name == "cosine_with_restarts" and option == "num_cycles"):
            if not (type(value) is int and value >= 1):
                return f"{option} is a whole number of at least 1"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            return f"{option} is a number, not {type(value).__name__}"
    for rate, fraction in rates.items():
        if rate in options and fraction in options:
            return f"{rate} and {fraction} say the same; give one of them"
        if rate in options and not 0 <= options[rate] < peak:
            return f"{rate} is a learning rate below the peak, learning_rate={peak}"
    return None


def warmup_updates(args: ArgumentFields, total: int) -> int:
    """Return the number of warm-up updates in a run of ``total`` updates."""
    if args.warmup_steps >= 1:
        return int(args.warmup_steps)
    return math.ceil(total * (args.warmup_steps or args.warmup_ratio))


def make_scheduler(optimizer: Optimizer, args: ArgumentFields, total: int) -> LRScheduler:
    """Make the schedule that ``args.lr_scheduler_type`` names.

    Args:
        optimizer: the current learning rates of its groups are the peaks.
        args: gives the name, the warm-up and the schedule's own options.
        total: updates in the whole run.
    """
    name = args.lr_scheduler_type
    if name in ON_METRIC:
        return ON_METRIC[name](
            optimizer, **{"mode": "max" if args.more_is_better else "min", **args.lr_scheduler_kwargs}
        )
    rates = AS_RATES.get(name, {})
    options = {
        rates.get(option, option): value / args.learning_rate if option in rates else value
        for option, value in args.lr_scheduler_kwargs.items()
    }
    shape, warmup_steps = partial(SHAPES[name], **options), warmup_updates(args, total)
    return Schedule(optimizer, lambda update: shape(update, warmup_steps, total))


def waits_for_metric(scheduler: LRScheduler) -> bool:
    """Return whether a schedule is stepped with the metric of an evaluation instead of after each update: its ``step``
    can't be called without an argument.
    """
    return step_takes_metric(type(scheduler))  # type: ignore[arg-type]


@cache
def step_takes_metric(made_by: type) -> bool:
    """Return whether ``step`` of a class of schedules needs an argument."""
    _, *parameters = inspect.signature(made_by.step).parameters.values()  # type: ignore[attr-defined]
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


class Schedule(LambdaLR):
    """A schedule by name: LambdaLR to the bit, in a quarter of its time: its step leaves out what guards torch's own
    against other uses. All groups follow one function.
    """

    def step(self, epoch: int | None = None) -> None:
        """Give each group the learning rate of the next update."""
        if epoch is not None or isinstance(self.base_lrs[0], Tensor):
            super().step(epoch)
            return
        self._step_count += 1
        self.last_epoch += 1
        self._get_lr_called_within_step = False
        factor = self.lr_lambdas[0](self.last_epoch)
        self._last_lr = [base * factor for base in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
