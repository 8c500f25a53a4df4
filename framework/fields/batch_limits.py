"""Limits in batches: a number of them, or a fraction of all as a float, in Python or as a command line writes them."""

import contextlib
from typing import Any

from .argument_fields import ArgumentFields

LIMITS = ("limit_train_batches", "limit_eval_batches", "overfit_batches")


def as_limit(given: Any) -> Any:
    """Return the number that a text is, an int where it is written as one; anything else as it is.

    Example:
        >>> as_limit("10"), as_limit("0.1"), as_limit(3)
        (10, 0.1, 3)
    """
    if isinstance(given, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(given)
        return None if given.strip().lower() == "none" else given
    return given


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) for every limit that can't work."""
    found: list[tuple[str, str]] = []
    for name in LIMITS:
        limit = getattr(args, name)
        is_number = isinstance(limit, int) and limit >= 1
        is_fraction = isinstance(limit, float) and 0.0 < limit <= 1.0
        if limit is not None and not is_number and not is_fraction:
            found.append((name, "must be a number of batches, at least 1, or a fraction in (0, 1] as a float, or None"))
    if args.fast_dev_run < 0:
        found.append(("fast_dev_run", "must be a number of updates, True for 1, or 0"))
    if args.overfit_batches is not None:
        others = ("limit_train_batches", "limit_eval_batches")
        limited = [name for name in others if getattr(args, name) is not None]
        if limited:
            why = f"trains and evaluates on these batches alone, and {' and '.join(limited)} limit others"
            found.append(("overfit_batches", f"{why}; leave one of them out"))
        if args.train_sampling_strategy == "group_by_length":
            why = "keeps the data's order, and train_sampling_strategy='group_by_length' draws another each epoch"
            found.append(("overfit_batches", f"{why}; leave one of them out"))
    return found
