"""How many micro-batches an update is made of, which may change from an epoch on."""

from collections.abc import Mapping
from typing import Any

from .argument_fields import ArgumentFields

NAME = "gradient_accumulation_schedule"
WITHOUT = ("limit_train_batches", "overfit_batches", "auto_find_batch_size")
"""Arguments that count in updates of one size."""


def as_schedule(given: Any) -> Any:
    """Return a schedule with whole numbers for what they are in text, in the order of epochs: JSON's keys are text.
    Anything that is no schedule comes back as it is.
    """
    if not isinstance(given, dict):
        return given
    try:
        return {epoch: given[key] for epoch, key in sorted((int(key), key) for key in given)}
    except (TypeError, ValueError):
        return given


def micro_batches_at(arguments: Mapping[str, Any], epoch: int) -> int:
    """Return how many micro-batches an update of an epoch is made of.

    Args:
        arguments: the fields of FitArguments, or those that a checkpoint holds.
        epoch: counted from 0.

    Example:
        >>> each = {"gradient_accumulation_steps": 8, "gradient_accumulation_schedule": {4: 2}}
        >>> [micro_batches_at(each, epoch) for epoch in (0, 3, 4, 9)]
        [8, 8, 2, 2]
    """
    found: int = arguments["gradient_accumulation_steps"]
    for begins, steps in as_schedule(arguments.get(NAME) or {}).items():
        if begins <= epoch:
            found = steps
    return found


def epochs_of(arguments: Mapping[str, Any]) -> set[int]:
    """The epochs at which the size of an update may change."""
    return {0, *as_schedule(arguments.get(NAME) or {})}


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) where the schedule can't work."""
    schedule = getattr(args, NAME)
    if not schedule:
        return []
    if not all(type(epoch) is int and epoch >= 1 for epoch in schedule):
        return [(NAME, "its keys are epochs, counted from 0; the first epoch has gradient_accumulation_steps")]
    if not all(type(steps) is int and steps >= 1 for steps in schedule.values()):
        return [(NAME, "its values are micro-batches per update, at least 1")]
    clashing = [name for name in WITHOUT if getattr(args, name)]
    if clashing:
        return [
            (NAME, f"changes the size of an update, by which {' and '.join(clashing)} counts; leave one of them out")
        ]
    return []
