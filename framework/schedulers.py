"""Learning-rate schedules by name: each a factor on the peak, as a function of the update."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

if TYPE_CHECKING:
    from .arguments import FitArguments

# (update, warm-up updates, all updates, **options) -> factor on learning_rate
Shape = Callable[..., float]


def rise(update: int, warmup_steps: int) -> float:
    """From 0 to 1 over ``warmup_steps`` updates, then 1."""
    return min(1.0, update / warmup_steps) if warmup_steps else 1.0


def done(update: int, warmup_steps: int, total: int) -> float:
    """How much of the run after warm-up is done, from 0 to 1."""
    return min(1.0, max(0, update - warmup_steps) / max(1, total - warmup_steps))


def half_cosine(fraction: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * fraction))


def constant(update: int, warmup_steps: int, total: int) -> float:
    """1 throughout."""
    return 1.0


def constant_with_warmup(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then 1."""
    return rise(update, warmup_steps)


def linear(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then a straight line to 0 at the end."""
    return rise(update, warmup_steps) * (1.0 - done(update, warmup_steps, total))


def cosine(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then half a cosine to 0 (Loshchilov and Hutter, 2017)."""
    return rise(update, warmup_steps) * half_cosine(done(update, warmup_steps, total))


def cosine_with_restarts(update: int, warmup_steps: int, total: int, *, num_cycles: int = 1) -> float:
    """Linear warm-up, then ``num_cycles`` half cosines, each from 1 to 0."""
    fraction = done(update, warmup_steps, total)
    return 0.0 if fraction >= 1.0 else rise(update, warmup_steps) * half_cosine((num_cycles * fraction) % 1.0)


def cosine_with_min_lr(update: int, warmup_steps: int, total: int, *, min_lr_rate: float = 0.1) -> float:
    """Linear warm-up, then half a cosine to ``min_lr_rate`` of the peak."""
    if update < warmup_steps:
        return rise(update, warmup_steps)
    return min_lr_rate + (1.0 - min_lr_rate) * half_cosine(done(update, warmup_steps, total))


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


def warmup_stable_decay(
    update: int, warmup_steps: int, total: int, *, num_decay_steps: int, min_lr_rate: float = 0.0
) -> float:
    """Linear warm-up, 1, then half a cosine to ``min_lr_rate`` over the last ``num_decay_steps`` (Hu et al., 2024)."""
    if update < warmup_steps:
        return rise(update, warmup_steps)
    fraction = min(1.0, max(0, update - (total - num_decay_steps)) / num_decay_steps)
    return min_lr_rate + (1.0 - min_lr_rate) * half_cosine(fraction)


PLATEAU = "reduce_lr_on_plateau"

SHAPES: Mapping[str, Shape] = {
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "cosine_with_min_lr": cosine_with_min_lr,
    "polynomial": polynomial,
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "inverse_sqrt": inverse_sqrt,
    "warmup_stable_decay": warmup_stable_decay,
}
SCHEDULERS = (*SHAPES, PLATEAU)
WITHOUT_WARMUP = ("constant", PLATEAU)


COUNTS = ("num_cycles", "num_decay_steps", "timescale")  # options that divide something


def scheduler_problem(name: str, options: Mapping[str, Any]) -> str | None:
    """Why a schedule can't take these options, or None where it can."""
    made_by: Callable[..., Any] = ReduceLROnPlateau if name == PLATEAU else SHAPES[name]
    parameters = inspect.signature(made_by).parameters.values()
    taken = {p.name: p for p in parameters if name == PLATEAU or p.kind is p.KEYWORD_ONLY}
    taken.pop("optimizer", None)
    unknown = [option for option in options if option not in taken]
    missing = [p.name for p in taken.values() if p.default is p.empty and p.name not in options]
    if unknown:
        return f"{name} has no option {', '.join(unknown)}; it takes {', '.join(taken) or 'none'}"
    if missing:
        return f"{name} needs {', '.join(missing)}"
    for option, value in options.items():
        if option in COUNTS and not (type(value) is int and value >= 1):
            return f"{option} is a whole number of at least 1"
        if name != PLATEAU and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{option} is a number, not {type(value).__name__}"
    return None


def make_scheduler(optimizer: Optimizer, args: "FitArguments", total: int) -> LRScheduler:
    """The schedule that ``args.lr_scheduler_type`` names.

    Args:
        optimizer: its groups' current learning rates are the peaks.
        args: gives the name, the warm-up and the schedule's own options.
        total: updates in the whole run.
    """
    if args.lr_scheduler_type == PLATEAU:
        options = {"mode": "max" if args.more_is_better else "min", **args.lr_scheduler_kwargs}
        return ReduceLROnPlateau(optimizer, **options)
    shape = partial(SHAPES[args.lr_scheduler_type], **args.lr_scheduler_kwargs)
    warmup_steps = args.warmup_steps or math.ceil(total * args.warmup_ratio)
    return LambdaLR(optimizer, lambda update: shape(update, warmup_steps, total))


def waits_for_metric(scheduler: LRScheduler) -> bool:
    """Whether a schedule is stepped with an evaluation's metric instead of after each update: its ``step`` can't be
    called without an argument.
    """
    return step_takes_metric(type(scheduler))  # type: ignore[arg-type]


@cache
def step_takes_metric(made_by: type) -> bool:
    """Whether ``step`` of a class of schedules needs an argument."""
    _, *parameters = inspect.signature(made_by.step).parameters.values()  # type: ignore[attr-defined]
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
