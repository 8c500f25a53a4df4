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

import copy
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..callbacks import Callbacks
from ..data import has_plain_sampler
from ..measures.memory import MemoryByStage
from ..module import TrainModule
from ..printing import say
from ..state import Control, TrainOutput
from .in_step import OtherRankError
from .out_of_memory import is_out_of_memory
from .plan import Plan


class Restartable(Protocol):
    """A Fit, as far as a run that begins again knows it.

    Attributes:
        strategy: set up.
        plan: of the run; settled where a run has begun.
        callbacks, control, memory: of the Fit.
    """

    strategy: Strategy
    plan: Plan
    callbacks: Callbacks
    control: Control
    memory: MemoryByStage

    @property
    def module(self) -> TrainModule:
        """The module, placed or not."""

    @property
    def placed(self) -> bool:
        """Whether the module was given to the strategy."""

    def place(self) -> None:
        """Give the module to the strategy, once."""

    def take_apart(self) -> None:
        """Undo what a run made, and what placing did."""

    def follow(self, plan: Plan) -> None:
        """Have the next run follow a plan, over data that it cuts anew."""

    def train_from(self, path: Path | None) -> TrainOutput:
        """Train from a checkpoint, or from the beginning where it is None, to the end of the run."""


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
    while True:
        try:
            with fit.strategy.attempt():
                start.return_weights(fit)
                output = fit.train_from(path)
                fit.strategy.sum_on_host([0])  # a rank that is done must hear of one that is out of memory after it
            return output
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            if isinstance(error, OtherRankError):
                reason = fit.strategy.hear_failure()
            else:
                reason = fit.strategy.tell_failure(describe(fit, error) if is_out_of_memory(error) else None)
            if reason is None:
                raise
            failure = error
        forget_frames(failure)
        asked = fit.plan.args
        args = with_smaller_batch(asked, at_most=asked.per_device_train_batch_size // 2)
        start.take_back(fit)
        if args is None:
            start.return_weights(fit)
            raise torch.OutOfMemoryError(
                f"Out of memory even with per_device_train_batch_size=1. {reason} What takes less memory: "
                "gradient_checkpointing=True, a 16-bit precision, strategy='fsdp2' over more ranks, shorter samples."
            ) from failure
        follow_batch_size(fit, args)
        if fit.strategy.is_main:
            say(
                f"Out of memory with per_device_train_batch_size={asked.per_device_train_batch_size}: beginning again "
                f"with {args.per_device_train_batch_size}, and gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} for the same samples an update. {reason}",
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


def describe(fit: Restartable, error: BaseException) -> str:
    """Say what was asked for, and what memory there is, for an error on this rank."""
    now = f"{fit.memory.stage}_memory_"
    memory = ", ".join(
        f"{name.removeprefix(now).replace('_', ' ')} {size / 2**30:.3f} GiB"
        for name, size in fit.memory.report().items()
        if name.startswith(now)
    )
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    message = " ".join(str(error).split()).rstrip(".")
    return f"Rank {fit.strategy.rank}{where}: {type(error).__name__}: {message}. Memory: {memory}."


def forget_frames(error: BaseException | None) -> None:
    """Take the frames out of an error and those it came from: their variables hold tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class Start:
    """Where every attempt at a run begins.

    Args:
        fit: before the first attempt.
    """

    def __init__(self, fit: Restartable) -> None:
        self.callbacks = copy.deepcopy(fit.callbacks.state_dict())
        self.flags = fit.control.flags()
        self.weights = {name: tensor.cpu().clone() for name, tensor in weights(fit).items()} if fit.placed else None
        self.is_untouched = True

    def take_back(self, fit: Restartable) -> None:
        """Undo an attempt, but for the weights: no rank has memory, connections or state left of it. Collective."""
        self.is_untouched = False
        fit.take_apart()
        fit.strategy.begin_again()
        fit.follow(fit.plan)
        fit.callbacks.load_state_dict(copy.deepcopy(self.callbacks))
        fit.control.set(self.flags)

    def return_weights(self, fit: Restartable) -> None:
        """Set the weights of a module that had been trained before, in an attempt that isn't the first."""
        if self.is_untouched or self.weights is None:
            return
        fit.place()
        with torch.no_grad():
            for name, tensor in weights(fit).items():
                tensor.copy_(self.weights[name])


def weights(fit: Restartable) -> dict[str, Tensor]:
    """What this rank holds of every parameter and buffer of the placed module, by name."""
    from torch.distributed.tensor import DTensor  # its import costs as much as torch's own

    named = {**fit.strategy.named_parameters(), **dict(fit.module.named_buffers())}
    return {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach() for name, tensor in named.items()
    }
