"""Attempts at a run: one that is out of memory on any rank ends on all of them, and another begins where it began."""

import copy
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...strategies.base import Strategy
from .. import random_state
from ..callbacks import Callbacks
from ..data import DataStream
from ..measures.memory import MemoryByStage
from ..module import TrainModule
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


@dataclass(frozen=True)
class OutOfMemory:
    """How an attempt ended for which some rank has no memory.

    Attributes:
        reason: what that rank asked for, and what memory there is; the same on every rank.
        error: of this rank, without its frames.
    """

    reason: str
    error: BaseException


def attempt(
    fit: Restartable,
    train: Callable[[Callable[[], None]], TrainOutput],
    may_begin_again: Callable[[], bool] = lambda: True,
) -> TrainOutput | OutOfMemory:
    """Train, and end on all ranks alike where one is out of memory.

    Args:
        fit: before the attempt.
        train: the attempt; given what it calls, if it likes, when no other attempt may follow it on any rank.
        may_begin_again: asked where this rank is out of memory: whether another attempt may follow.

    Returns:
        What training gave; or why there is to be another attempt: then ``Start.take_back`` comes next, by which ranks
        that wait for this one are woken.

    Raises:
        Exception: whatever else ended the run.
    """
    try:
        with ExitStack() as stack:
            stack.enter_context(fit.strategy.attempt())
            output = train(stack.close)
            fit.strategy.sum_on_host([0])  # a rank that is done must hear of one that is out of memory after it
        return output
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if isinstance(error, OtherRankError):
            reason = fit.strategy.hear_failure()
        else:
            begins_again = is_out_of_memory(error) and may_begin_again()
            reason = fit.strategy.tell_failure(describe(fit, error) if begins_again else None)
        if reason is None:
            raise
        failure = error
    forget_frames(failure)
    return OutOfMemory(reason, failure)


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


class Standing:
    """Where random numbers stand before a run: those of the process, of the strategy and of the data's generators.

    Args:
        strategy: set up.
        stream: the run's data.
    """

    def __init__(self, strategy: Strategy, stream: DataStream) -> None:
        self.generators = [(each, each.get_state()) for each in stream.generators()]
        self.random = {**random_state.capture(), **strategy.random_state()}

    def restore(self, strategy: Strategy) -> None:
        """Have them stand there again."""
        for generator, before in self.generators:
            generator.set_state(before)
        random_state.restore(self.random)
        strategy.restore_random_state(self.random)


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
