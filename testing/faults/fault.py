"""What every fault is: a callback that strikes at a chosen rank, update and phase, and says where it could not."""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from typing_extensions import TypedDict

from ...framework.arguments import FitArguments
from ...framework.callbacks import Callback
from ...framework.state import Control, TrainState
from .opening import before_writing

PHASES: dict[str, str] = {
    "train_begin": "everything is placed and restored; the update is the last one that was done (0 at the beginning)",
    "data": "the update's samples are about to be read",
    "begin": "the samples are there, and forward comes next",
    "forward": "inside forward of the module, in the first layer that is called",
    "backward": "inside the backward, when the first layer's gradient arrives",
    "step": "gradients are complete, and the optimizer has not stepped",
    "end": "the update is over; nothing of it has been logged or saved",
    "evaluate": "inside an evaluation after the update, after its first batch",
    "save": "inside the saving of the update's checkpoint, when this rank opens its first file to write",
    "saved": "the update's checkpoint is there",
    "train_end": "training is over; the update is the last one",
}
"""Where a fault can strike: the name of a phase, and what is then."""

INSIDE_UPDATE = "data", "begin", "forward", "backward", "step", "end"


class FaultError(RuntimeError):
    """A fault could not strike where it was told to, so that what was to be proven isn't."""


class Where(TypedDict, total=False):
    """Where a fault strikes; see Fault."""

    rank: int | Collection[int] | None
    update: int | Collection[int] | None
    phase: str
    attempt: int | None
    once_file: str | Path | None


class Fault(Callback):
    """Strikes once in each chosen update, on the chosen ranks. A subclass says in ``strike`` what happens then.

    Args:
        rank: one, or several, or None for every rank.
        update: its number, beginning with 1, or several (``range(5, 9)``), or None for every update.
        phase: a key of PHASES.
        attempt: how often the run had been started again by its launcher (``max_restarts``); None for any. A run that
            begins once more is so left in peace.
        once_file: a path; the fault strikes only while ``<once_file>.<rank>`` isn't there, and makes it before. For
            runs that are started again by something else than a launcher, such as a scheduler.

    Raises:
        ValueError: there is no such phase, or no such update.

    Example:
        >>> class Shout(Fault):
        ...     def strike(self, fit):
        ...         print("in update", fit.state.global_step + 1)
        >>> _ = Fit(Regressor(), dataset, callbacks=[Shout(update=2, phase="forward")], max_steps=3, loggers=(),
        ...     save_strategy="no", progress=False).train()
        in update 2
    """

    def __init__(
        self,
        *,
        rank: int | Collection[int] | None = 0,
        update: int | Collection[int] | None = 1,
        phase: str = "begin",
        attempt: int | None = 0,
        once_file: str | Path | None = None,
    ) -> None:
        if phase not in PHASES:
            raise ValueError(f"phase takes one of {', '.join(map(repr, PHASES))}. Received: {phase!r}")
        self.ranks = (rank,) if isinstance(rank, int) else rank
        self.updates = (update,) if isinstance(update, int) else update
        if self.updates is not None and any(number < 0 for number in self.updates):
            raise ValueError(f"update takes numbers of updates, of which the first is 1. Received: {update!r}")
        self.phase, self.attempt = phase, attempt
        self.once_file = None if once_file is None else Path(once_file)
        self.struck: set[int] = set()
        """The updates in which the fault has struck on this rank."""
        self._hooks: list[Any] = []
        self._undo = ExitStack()

    def strike(self, fit: Any) -> None:
        """Do the damage. Called in the chosen update and phase.

        Args:
            fit: the Fit that is training.
        """
        raise NotImplementedError

    def is_due(self, fit: Any, update: int) -> bool:
        """Return whether the fault is to strike on this rank in an update, and hasn't yet."""
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        rank = fit.strategy.rank
        return (
            (self.ranks is None or rank in self.ranks)
            and (self.updates is None or update in self.updates)
            and (self.attempt is None or self.attempt == attempt)
            and update not in self.struck
            and (self.once_file is None or not Path(f"{self.once_file}.{rank}").exists())
        )

    def reach(self, phase: str, fit: Any, update: int) -> None:
        """Strike where the run has come to the chosen phase of a chosen update."""
        if phase != self.phase or not self.is_due(fit, update):
            return
        self.struck.add(update)
        self._remove_hooks()
        if self.once_file is not None:
            Path(f"{self.once_file}.{fit.strategy.rank}").touch(exist_ok=False)
        self.strike(fit)

    # How a run comes to the phases.

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Get between the run and what it reads or writes, where the fault is to strike there."""
        if self.phase == "data":
            self._read_through(fit)
        elif self.phase == "save":
            named = re.compile(r"checkpoint-(\d+)\.partial(/|$)")

            def opened(path: str) -> None:
                if (found := named.search(path)) is not None:
                    self.reach("save", fit, int(found[1]))

            self._undo.enter_context(before_writing(args.output_dir, opened))
        self.reach("train_begin", fit, state.global_step)

    def on_step_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Strike, or listen to the layers where the fault is to strike inside forward or backward."""
        update = state.global_step + 1
        self.reach("begin", fit, update)
        if self.phase in ("forward", "backward") and self.is_due(fit, update):
            self.listen_to_layers(fit, update)

    def on_pre_optimizer_step(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Strike before the optimizer steps."""
        self.reach("step", fit, state.global_step + 1)

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """Strike at the update's end.

        Raises:
            FaultError: the fault should have struck in this update, and had no occasion to.
        """
        self.reach("end", fit, state.global_step)
        if self.phase in INSIDE_UPDATE and self.is_due(fit, state.global_step):
            raise FaultError(
                f"{type(self).__name__} should have struck in phase {self.phase!r} of update {state.global_step} on "
                f"rank {fit.strategy.rank}, and couldn't: {self.why_not(fit)}"
            )

    def on_prediction_step(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Strike inside an evaluation."""
        self.reach("evaluate", fit, state.global_step)

    def on_save(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """Strike after a checkpoint."""
        self.reach("saved", fit, state.global_step)

    def on_train_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Strike at the end, and get out of the way of what the run reads and writes."""
        self.reach("train_end", fit, state.global_step)
        self._leave()

    def on_exception(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Get out of the way of what the run reads and writes."""
        self._leave()

    def why_not(self, fit: Any) -> str:
        """Say why a fault inside an update may have had no occasion to strike."""
        return f"no layer of {type(fit.module).__name__} was called as one, with a gradient to compute."

    def listen_to_layers(self, fit: Any, update: int) -> None:
        """Have the layers, as they are called, bring the fault to the phase inside the update's forward or backward."""

        def entered(layer: nn.Module, inputs: Any) -> None:
            self.reach("forward", fit, update)

        def left(layer: nn.Module, inputs: Any, outputs: Any) -> None:
            for tensor in tree_leaves(outputs):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.reach("backward", fit, update))

        for layer in innermost_layers(fit.module):
            hook = layer.register_forward_pre_hook(entered) if self.phase == "forward" else None
            self.keep_hook(hook or layer.register_forward_hook(left))

    def keep_hook(self, hook: Any) -> None:
        """Keep the handle of a hook until the fault has struck."""
        self._hooks.append(hook)

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _leave(self) -> None:
        self._remove_hooks()
        self._undo.close()

    def _read_through(self, fit: Any) -> None:
        """Have the stream of training data come by here before each micro-batch that it reads."""
        stream, state = fit.stream, fit.state
        read = stream.epoch

        def passed_on(batches: Iterator[Any]) -> Iterator[Any]:
            while True:
                self.reach("data", fit, state.global_step + 1)
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                yield batch

        def epoch(number: int) -> Iterator[Any]:
            return passed_on(iter(read(number)))  # what is to be read at once, read reads

        stream.epoch = epoch
        self._undo.callback(delattr, stream, "epoch")


def innermost_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a module that hold no others; the module itself where it has none."""
    return [layer for layer in module.modules() if not any(True for _ in layer.children())]
