"""auto_find_batch_size: a run that is out of memory begins again with a smaller micro-batch and the same global batch.

Each attempt begins where the first one began, or at the checkpoint that is resumed from: the run is, to the bit, what
it would be had the smaller batch been asked for. That takes back the module (weights, buffers, and attributes as they
were before it was first placed), optimizer, schedule, loss scale, random state, data order and the states of callbacks.
It leaves what only the user's objects know (a dataset's or a callback's own variables), and checkpoints of the failed
attempt, which are replaced as the new one comes to them.

An attempt that is out of memory ends with ``on_exception`` (with ``on_train_end`` on a rank that was done before
another one failed); the next one begins with the loggers' ``begin`` and ``on_train_begin``. ``on_init_end`` is not
repeated. The size that was found is logged once, as ``per_device_train_batch_size`` beside
``gradient_accumulation_steps``, and is ``state.train_batch_size``, which checkpoints save: a run that is resumed with
the option begins with it, and so does a further ``train`` of the same Fit.

Where one rank is out of memory the others are woken, and all meet in another process group; see
``strategies/meeting.py``.

An evaluation keeps ``per_device_eval_batch_size``: where that is too large, a smaller training batch helps nothing.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..arguments import FitArguments
from ..data import has_plain_sampler
from ..printing import say
from ..state import TrainOutput
from .attempts import OutOfMemory, Restartable, Start, attempt


def with_smaller_batch(args: FitArguments, at_most: int) -> FitArguments | None:
    """The same samples an update by the largest micro-batch of at most so many samples; None where that is below 1."""
    total = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for size in range(at_most, 0, -1):
        if total % size == 0:
            return args.replace(per_device_train_batch_size=size, gradient_accumulation_steps=total // size)
    return None


def with_loader_batch_size(args: FitArguments, train_data: Any) -> FitArguments:
    """The arguments, with the batch size that a ready DataLoader brings where it is to be looked for.

    Raises:
        ValueError: the DataLoader's batches are made by a sampler that can't be asked for smaller ones.
    """
    if not args.auto_find_batch_size or not isinstance(train_data, DataLoader):
        return args
    if not has_plain_sampler(train_data):
        raise ValueError(
            "auto_find_batch_size=True makes smaller batches, but train_data is a DataLoader whose sampler, batch "
            "sampler or generator is its own, and is taken as it is. Pass the dataset itself with "
            "per_device_train_batch_size=, or a DataLoader with batch_size= and shuffle= alone."
        )
    assert train_data.batch_size is not None
    return args.replace(per_device_train_batch_size=train_data.batch_size)


def train(fit: Restartable, path: Path | None) -> TrainOutput:
    """Train from a checkpoint, or from the beginning, and begin again with a smaller batch as long as any rank is out
    of memory.

    Args:
        fit: before a run.
        path: the checkpoint to resume from; None begins at the beginning.

    Returns:
        What the attempt that fitted into memory gave.

    Raises:
        torch.OutOfMemoryError: micro-batches of one sample don't fit; the message has the figures.
        Exception: whatever else ended the run, where no rank was out of memory.
    """
    follow_batch_size(fit, size_in_checkpoint(fit.plan.args, path))
    start = Start(fit)

    def train_once(over: object) -> TrainOutput:
        start.return_weights(fit)
        return fit.train_from(path)

    while True:
        ended = attempt(fit, train_once)
        if not isinstance(ended, OutOfMemory):
            return ended
        asked = fit.plan.args
        args = with_smaller_batch(asked, at_most=asked.per_device_train_batch_size // 2)
        start.take_back(fit)
        if args is None:
            start.return_weights(fit)
            raise torch.OutOfMemoryError(
                f"Out of memory even with per_device_train_batch_size=1. {ended.reason} What takes less memory: "
                "gradient_checkpointing=True, a 16-bit precision, strategy='fsdp2' over more ranks, shorter samples."
            ) from ended.error
        follow_batch_size(fit, args)
        if fit.strategy.is_main:
            say(
                f"Out of memory with per_device_train_batch_size={asked.per_device_train_batch_size}: beginning again "
                f"with {args.per_device_train_batch_size}, and gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} for the same samples an update. {ended.reason}",
                sys.stderr,
            )


def follow_batch_size(fit: Restartable, args: FitArguments) -> None:
    """Have the next attempt follow the batch size of some arguments, where that is another."""
    if args.per_device_train_batch_size != fit.plan.args.per_device_train_batch_size:
        fit.follow(fit.plan.with_batch_size(args))


def size_in_checkpoint(args: FitArguments, path: Path | None) -> FitArguments:
    """The arguments, with a batch no larger than the one that was found by the run that is resumed."""
    if path is None:
        return args
    from ..checkpoint import read_state

    size = read_state(path)["progress"].get("train_batch_size")
    if size is None or size >= args.per_device_train_batch_size:
        return args
    fitting = with_smaller_batch(args, at_most=size)
    assert fitting is not None
    return fitting
