"""The cadence of logs, evaluations and checkpoints: when each is due, the same on every rank."""

import math

from ..state import Control, TrainState
from .argument_fields import ArgumentFields, Arguments

CADENCES = ("no", "steps", "epoch")
BEST = "best"  # a value of save_strategy alone
STEPS = ("logging_steps", "eval_steps", "save_steps")
"""The arguments that are a number of updates or a fraction of the run."""


def is_number_or_fraction(steps: float | None) -> bool:
    """Return whether this is a number of updates, a fraction of the run, or None (another argument's value)."""
    return steps is None or 0 < steps < 1 or (steps >= 1 and float(steps).is_integer())


def in_updates(steps: float, max_steps: int) -> int:
    """Return the number of updates between two events.

    Args:
        steps: as the user gave it: a number of updates, or a fraction of the run, in (0, 1).
        max_steps: the length of the run.

    Returns:
        A whole number of updates. A fraction is rounded up, as in transformers: 0.3 of 25 updates are 8.
    """
    # The product is rounded first, so that 0.07 of 100 updates, in floating point 7.000000000000001, are 7.
    return int(steps) if steps >= 1 else math.ceil(round(steps * max_steps, 6)) or 1


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) for every field of the cadence that can't work."""
    found: list[tuple[str, str]] = []

    def require(name: str, holds: bool, why: str) -> None:
        if not holds:
            found.append((name, why))

    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        known = (*CADENCES, BEST) if name == "save_strategy" else CADENCES
        require(name, getattr(args, name) in known, f"must be one of {', '.join(map(repr, known))}")
    uncounted = [name for name in STEPS if not is_number_or_fraction(getattr(args, name))]
    for name in uncounted:
        require(name, False, "must be a number of updates, at least 1, or a fraction of the run between 0 and 1")
    evaluates = args.eval_strategy != "no"
    require(
        "eval_steps",
        args.eval_steps is None or args.eval_strategy == "steps",
        f"has no effect with eval_strategy={args.eval_strategy!r}; write eval_strategy='steps'",
    )
    require("eval_delay", evaluates or not args.eval_delay, "has no effect with eval_strategy='no'")
    require(
        "greater_is_better",
        args.greater_is_better is None or args.metric_for_best_model is not None,
        "has no effect without metric_for_best_model",
    )
    require(
        "save_strategy",
        args.save_strategy != BEST or evaluates,
        "needs evaluations to tell which is best; set eval_strategy to 'steps' or 'epoch'",
    )
    keeps = args.save_best_limit > 1
    require("save_best_limit", evaluates or not keeps, "needs evaluations to tell which are best; set eval_strategy")
    require(
        "save_best_limit",
        not keeps or args.save_total_limit is not None or args.save_strategy == BEST,
        "has no effect where nothing is removed; set save_total_limit",
    )
    require(
        "load_best_model_at_end",
        not args.load_best_model_at_end or evaluates,
        "needs evaluations to tell which is best; set eval_strategy to 'steps' or 'epoch'",
    )
    require(
        "load_best_model_at_end",
        not args.load_best_model_at_end or args.save_strategy != "no",
        "needs checkpoints to load from; set save_strategy as eval_strategy",
    )
    if args.load_best_model_at_end and not uncounted and evaluates and args.save_strategy not in ("no", BEST):
        evaluated, saved = spacing(args)
        matches = args.save_strategy == args.eval_strategy and (min(evaluated, saved) < 1 or saved % evaluated == 0)
        require(
            "save_strategy",
            matches,
            "with load_best_model_at_end each checkpoint needs an evaluation of its own: save as evaluation goes "
            f"(eval_strategy={args.eval_strategy!r}), every multiple of {evaluated} updates; here every {saved}",
        )
    return found


def spacing(args: ArgumentFields) -> tuple[float, float]:
    """Return what lies between two evaluations, and between two checkpoints: updates, or a fraction of the run where
    its length isn't known yet. The rules are checked again once the length is known.
    """
    steps = args.eval_every or 1, args.save_steps
    if args.max_steps < 1:
        return steps
    return in_updates(steps[0], args.max_steps), in_updates(steps[1], args.max_steps)


def resolve(args: Arguments, max_steps: int) -> Arguments:
    """Fill in the length of the run, and every number of updates that depends on it.

    Returns:
        A copy of the arguments.

    Raises:
        ValueError: the arguments contradict each other at this length.
    """
    given = {name: getattr(args, name) for name in STEPS}
    counted = {name: in_updates(steps, max_steps) for name, steps in given.items() if steps is not None}
    return args.replace(max_steps=max_steps, **counted)


def after_update(args: ArgumentFields, state: TrainState, control: Control) -> None:
    """Raise the flags that are due after an update: by steps, and at the end of the run."""
    step = state.global_step
    evaluates = args.eval_strategy == "steps" and step >= args.eval_delay
    if args.logging_strategy == "steps" and (step % args.logging_steps == 0 or (step == 1 and args.logging_first_step)):
        control.should_log = True
    if evaluates and step % (args.eval_every or 1) == 0:
        control.should_evaluate = True
    if args.save_strategy == "steps" and step % args.save_steps == 0:
        control.should_save = True
    tries = 0 < args.fast_dev_run <= step
    if tries and step < state.max_steps:
        control.stop_training(f"fast_dev_run={args.fast_dev_run}")
    if tries or step >= state.max_steps:
        control.should_training_stop = True
        control.should_log |= args.logging_strategy == "steps"
        control.should_evaluate |= evaluates
        control.should_save |= args.save_strategy == "steps"


def after_epoch(args: ArgumentFields, state: TrainState, control: Control) -> None:
    """Raise the flags that are due after an epoch."""
    control.should_log |= args.logging_strategy == "epoch"
    control.should_evaluate |= args.eval_strategy == "epoch" and state.epoch >= args.eval_delay
    control.should_save |= args.save_strategy == "epoch"
