"""Learning-rate schedules by name: each a factor on the peak, as a function of the update."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

if TYPE_CHECKING:
    from .arguments import FitArguments

# (update, warm-up updates, all updates) -> factor on learning_rate
Shape = Callable[[int, int, int], float]


def warmup(update: int, warmup_steps: int) -> float:
    """Rises from 0 to 1 over ``warmup_steps`` updates, then stays."""
    return min(1.0, update / warmup_steps) if warmup_steps else 1.0


def progress(update: int, warmup_steps: int, total: int) -> float:
    """How much of the run after warm-up is done, from 0 to 1."""
    return min(1.0, max(0, update - warmup_steps) / max(1, total - warmup_steps))


def constant(update: int, warmup_steps: int, total: int) -> float:
    """1 throughout; warm-up has no effect."""
    return 1.0


def constant_with_warmup(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then 1."""
    return warmup(update, warmup_steps)


def linear(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then a straight line to 0 at the end."""
    return warmup(update, warmup_steps) * (1.0 - progress(update, warmup_steps, total))


def cosine(update: int, warmup_steps: int, total: int) -> float:
    """Linear warm-up, then half a cosine to 0 (Loshchilov and Hutter, 2017)."""
    return warmup(update, warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * progress(update, warmup_steps, total)))


SCHEDULERS: Mapping[str, Shape] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
}


def make_scheduler(optimizer: Optimizer, args: "FitArguments", total: int) -> LRScheduler:
    """The schedule that ``args.lr_scheduler_type`` names.

    Args:
        optimizer: its groups' current learning rates are the peaks.
        args: gives the name and the warm-up.
        total: updates in the whole run.
    """
    shape = SCHEDULERS[args.lr_scheduler_type]
    return LambdaLR(optimizer, lambda update: shape(update, args.warmup_steps, total))
