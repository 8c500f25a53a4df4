"""Stepping: what ends the updates of one optimizer: clipping, the step, made or left out, and its schedule."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..data import DataStream
from ..labelling import Labelled
from ..optim.schedulers import waits_for_metric
from ..state import TrainState
from .transaction import Attempt, Transaction


class SteppedRun(Protocol):
    """A run, as far as what ends its updates knows it; see ``Run``."""

    strategy: Strategy
    stream: DataStream
    state: TrainState
    epoch_index: int
    begins_at: int
    attempts: int

    @property
    def stepping(self) -> "Stepping":
        """What ends its updates; of several, the first."""

    def take_back(self, attempt: Attempt) -> None:
        """Count an update that was left out."""


class Stepping(Labelled):
    """Ends the updates of an optimizer. A run has one; a run in turns has one for each turn.

    Args:
        run: whose updates they are.
        args: of the run.
        turn: the turn's name; "" in a run without turns.

    Attributes:
        transaction: decides which updates are made.
        grad_norm: of the last update, on the device; None where gradients aren't clipped.
        learning_rate: of the last update.
        schedule_is_due: whether it isn't known yet if the last update was made.
    """

    PHASES = {"clip": "gradients", "step": "optimizer"}

    def __init__(self, run: SteppedRun, args: FitArguments, turn: str = "") -> None:
        self.run, self.args, self.strategy, self.turn = run, args, run.strategy, turn
        self.transaction = Transaction(args, run.strategy, run.stream.indices, turn)
        self.grad_norm: Tensor | None = None
        self.learning_rate: float | Tensor = 0.0
        self.schedule_is_due = False
        self._measure: Tensor | None = None  # of the last update's gradients; not finite where they aren't
        self._loss: Tensor | None = None  # of the last update, on this rank
        self._attempted: Attempt | None = None  # the last update, where it isn't known yet whether it was made
        self._optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, or the one of the turn."""
        assert self._optimizer is not None, "the optimizer is made when training begins"
        return self._optimizer

    @property
    def scheduler(self) -> LRScheduler:
        """The schedule of the learning rate."""
        assert self._scheduler is not None, "the schedule is made when training begins"
        return self._scheduler

    def begin(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Take the optimizer, which was reset, and its schedule."""
        self.transaction.say_what_it_cannot(optimizer)
        self._optimizer, self._scheduler = optimizer, scheduler

    def at_work(self) -> AbstractContextManager[Any]:
        """Entered around what is asked of the strategy between two updates: it is then asked about this optimizer."""
        return self.strategy.turn(self.turn) if self.turn else nullcontext()

    # One update.

    def clip(self, parameters: list[Any]) -> None:
        """Complete the gradients, scale them down to ``max_grad_norm``, and keep their norm, on the device."""
        self.strategy.prepare_gradients()
        limit = self.args.max_grad_norm
        if limit:
            self._measure = self.grad_norm = self.strategy.clip_grad_norm(parameters, limit)
        else:
            self.grad_norm = None
            self._measure = self.strategy.find_nonfinite(parameters) if self.transaction.looks else None

    def step(self, loss: Tensor) -> None:
        """Step the optimizer, unless the update isn't to be made. The schedule is to follow, once that is known.

        Args:
            loss: of the update, over this rank.
        """
        self.settle_schedule()  # of the update before, where the host has only now learned whether it was made
        assert self._optimizer is not None
        self.learning_rate = rate = self._optimizer.param_groups[0]["lr"]
        if self is self.run.stepping:  # of several, the first
            self.run.state.begin_step(rate)
        self._loss = loss
        refused = self.transaction.judge(self._measure)
        if refused is False:
            self.strategy.step()
        elif refused is True:
            self.strategy.skip()
        else:
            self.strategy.step(refused)
        self.schedule_is_due = True

    def take_update(self, loss: Tensor, measure: Tensor, parameters: Sequence[Any], norms: Tensor) -> None:
        """Take in an update that was made, or left out, by a program: what ``clip`` and ``step`` do otherwise.

        Args:
            loss: of the update.
            measure: the norm of its gradients; where they aren't clipped, a number that is finite where they are.
            parameters: that have a gradient.
            norms: of each of those gradients.
        """
        self._loss, self._measure = loss, measure
        self.grad_norm = measure if self.args.max_grad_norm else None
        self.strategy.note_norms(parameters, norms)
        self.transaction.judge(measure)
        self.strategy.weights_have_changed()
        self.schedule_is_due = True

    # Whether it was made, and what follows.

    def settle_known_schedule(self) -> None:
        """Settle the schedule at once, where the host knows already whether the update was made."""
        if self.transaction.on_host and self.strategy.precision.skip_is_known():
            self.settle_schedule()

    def settle_schedule(self) -> None:
        """Move the schedule for the last update, or count it as skipped, once it is known which."""
        if self.schedule_is_due:
            self.schedule_is_due = False
            scheduler, transaction = self._scheduler, self.transaction
            assert scheduler is not None
            if transaction.was_skipped():
                self._take_back()
                return
            if transaction.in_a_row:
                transaction.end_row()
            if not waits_for_metric(scheduler):
                scheduler.step()

    def _take_back(self) -> None:
        """Count the last update, which was left out."""
        attempt = self._attempted or self.note_attempt()
        self._attempted = None
        self.run.take_back(attempt)
        self.transaction.note_skipped(attempt)

    def note_attempt(self) -> Attempt:
        """Note the update that is under way, for who may have to say that it wasn't made."""
        assert self._loss is not None
        run, transaction = self.run, self.transaction
        suspects = transaction.suspects
        if suspects is None and transaction.on_host and self.strategy.precision.judges_gradients:
            suspects = self.strategy.suspects()
        spike = transaction.spikes.describe() if transaction.is_spike and transaction.spikes else None
        self._attempted = Attempt(
            run.state.global_step + 1,
            run.epoch_index,
            run.begins_at,
            run.stream.position,
            self.grad_norm,
            self._loss,
            suspects,
            spike,
            run.attempts,
        )
        return self._attempted

    # What a checkpoint holds of it.

    def state_dict(self) -> dict[str, Any]:
        """The schedule, and the updates that were left out last, as JSON types. Collective."""
        return {"transaction": self.transaction.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, but for the schedule (see ``Run.load_state_dict``)."""
        if "transaction" in state:  # earlier versions left no update out
            self.transaction.load_state_dict(state["transaction"])


class TurnStepping(Stepping):
    """Ends the updates of a turn, of which a round may have several. The schedule moves once a round, where one of them
    was made.

    Attributes:
        skipped: updates of the turn that were left out.
        skipped_rounds: rounds in which all of them were.
    """

    def __init__(self, run: SteppedRun, args: FitArguments, turn: str) -> None:
        super().__init__(run, args, turn)
        self.skipped = self.skipped_rounds = 0
        self._was_made = self._round_is_over = False

    def settle_schedule(self) -> None:
        """Note of the turn's last update whether it was made, once it is known; after a round, move the schedule."""
        if self.schedule_is_due:
            self.schedule_is_due = False
            if self.transaction.was_skipped():
                self.skipped += 1
                self._take_back()
            else:
                self._was_made = True
                if self.transaction.in_a_row:
                    self.transaction.end_row()
            if self._round_is_over:
                self._move_schedule()

    def end_round(self) -> None:
        """Move the schedule for a round, now or once it is known whether it was made."""
        if self.schedule_is_due:
            self._round_is_over = True
        else:
            self._move_schedule()

    def _move_schedule(self) -> None:
        was_made, self._was_made, self._round_is_over = self._was_made, False, False
        if not was_made:
            self.skipped_rounds += 1
        elif not waits_for_metric(self.scheduler):
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The same, the name of the optimizer, and the updates and rounds that were left out."""
        counts = {"skipped": self.skipped, "skipped_rounds": self.skipped_rounds}
        return {**super().state_dict(), "optim": self.args.optim, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, but for the schedule."""
        super().load_state_dict(state)
        self.skipped, self.skipped_rounds = state["skipped"], state["skipped_rounds"]
