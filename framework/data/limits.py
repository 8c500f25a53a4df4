"""Epochs and evaluations that end before their data does: how far they reach, in positions of a stream.

A limit on training counts updates, whose samples are the same however ranks and micro-batches share them. A limit on an
evaluation counts batches of ``per_device_eval_batch_size`` samples (or of a ready DataLoader), whatever ranks share
them. So neither changes with the strategy or the number of ranks.
"""

import math

from ..arguments import FitArguments
from .stream import DataStream


def limit_epochs(stream: DataStream, args: FitArguments, batches: int) -> None:
    """Have the epochs of training end where ``limit_train_batches`` or ``overfit_batches`` says.

    Args:
        stream: not begun.
        args: of the run.
        batches: of an update, each of ``gradient_accumulation_steps`` micro-batches.

    Raises:
        ValueError: a fraction of data without a length; or every epoch was to have the same batches, and can't.
    """
    if args.overfit_batches:
        stream.repeat()
    for name in ("limit_train_batches", "overfit_batches"):
        of_update = stream.positions_of_micro_batch * args.gradient_accumulation_steps * batches
        limit(stream, name, getattr(args, name), of_update)


def limit_evaluation(stream: DataStream, args: FitArguments) -> None:
    """Have an evaluation end where ``limit_eval_batches`` says; with ``fast_dev_run``, after so many whole batches of
    every rank.

    Raises:
        ValueError: a fraction of data without a length.
    """
    if args.fast_dev_run:
        limit(stream, "fast_dev_run", args.fast_dev_run, stream.positions_of_micro_batch)
    else:
        limit(stream, "limit_eval_batches", args.limit_eval_batches, stream.positions_of_batch)


def limit(stream: DataStream, name: str, batches: object, positions_of_batch: int) -> None:
    """Have a stream end after some batches.

    Args:
        stream: not begun.
        name: of the argument.
        batches: their number; or, as a float, a fraction of them, rounded down, but one at least; None is no limit.
        positions_of_batch: how far one of them moves the position.

    Raises:
        ValueError: a fraction of data without a length.
    """
    if isinstance(batches, int):
        stream.end_after(batches * positions_of_batch)
    elif isinstance(batches, float) and batches < 1.0:
        samples = stream.capacity()
        if samples is None:
            raise ValueError(
                f"{name}={batches!r} is a fraction, and the data has no length to take it of. Write a number of "
                f"batches: {name}=10."
            )
        usable = min(samples, len(stream) * stream.positions_of_micro_batch)  # drop_last leaves some out
        whole = -(-usable // positions_of_batch)
        # The product is rounded first, so that 0.07 of 100 batches, in floating point 7.000000000000001, are 7.
        stream.end_after(max(1, math.floor(round(batches * whole, 6))) * positions_of_batch)
