"""When a log, an evaluation and a checkpoint are due, as the arguments say; the same on every rank."""

import math
from typing import TYPE_CHECKING

from .state import Control, TrainState

if TYPE_CHECKING:
    from .arguments import FitArguments

CADENCES = ("no", "steps", "epoch")
STEPS = ("logging_steps", "eval_steps", "save_steps")
"""The arguments that count updates, or are a fraction of the run."""


def is_number_or_fraction(steps: float | None) -> bool:
    """Whether this can be a cadence; None stands for another argument's."""
    return steps is None or 0 < steps < 1 or (steps >= 1 and float(steps).is_integer())


def in_updates(steps: float, max_steps: int) -> int:
    """Updates between two events.

    Args:
        steps: as the argument says it: a number of updates, or a fraction of the run, in (0, 1).
        max_steps: the length of the run.

    Returns:
        A fraction rounded up, as in transformers: 0.3 of 25 updates are 8.
    """
    # Rounded first, so that 0.07 of 100 updates, in floating point 7.000000000000001, are 7.
    return int(steps) if steps >= 1 else math.ceil(round(steps * max_steps, 6)) or 1


def resolve(args: "FitArguments", max_steps: int) -> "FitArguments":
    """The arguments with the length of the run, and every number of updates that depends on it, filled in.

    Raises:
        ValueError: they contradict each other at this length.
    """
    given = {name: getattr(args, name) for name in STEPS}
    counted = {name: in_updates(steps, max_steps) for name, steps in given.items() if steps is not None}
    return args.replace(max_steps=max_steps, **counted)


def after_update(args: "FitArguments", state: TrainState, control: Control) -> None:
    """Raise the flags that are due after an update: by steps, and at the end of the run."""
    step = state.global_step
    if args.logging_strategy == "steps" and (step % args.logging_steps == 0 or (step == 1 and args.logging_first_step)):
        control.should_log = True
    if args.eval_strategy == "steps" and step % (args.eval_every or 1) == 0:
        control.should_evaluate = True
    if args.save_strategy == "steps" and step % args.save_steps == 0:
        control.should_save = True
    if step >= state.max_steps:
        control.should_training_stop = True
        control.should_log |= args.logging_strategy == "steps"
        control.should_save |= args.save_strategy == "steps"


def after_epoch(args: "FitArguments", control: Control) -> None:
    """Raise the flags that are due after an epoch."""
    control.should_log |= args.logging_strategy == "epoch"
    control.should_evaluate |= args.eval_strategy == "epoch"
    control.should_save |= args.save_strategy == "epoch"
