"""Run: all that changes between two updates, and so all that a checkpoint holds but tensors."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...strategies.base import Strategy
from .. import checkpoint, random_state
from ..callbacks import Callbacks
from ..data import DataStream
from ..labelling import Labelled
from ..measures.averages import Averages
from ..measures.memory import MemoryByStage
from ..module import TrainModule
from ..optim.schedulers import waits_for_metric
from ..printing import say
from ..state import Control, TrainState
from ..watch.watch import Watch
from .configured import configured_scheduler
from .exchange import UpdateExchange
from .in_step import InStep
from .pace import Pace
from .placement import Placement
from .plan import Plan
from .rescue import Rescue
from .statistics import RunningStatistics, running_statistics
from .totals import Totals
from .transaction import Attempt, Transaction


class Run(Labelled):
    """One run, from its first update to its last. Each ``train`` makes a new one.

    Args:
        plan: of the run, settled.
        strategy: set up.
        stream: the training data of this rank.
        state, control: the Fit's progress and flags, which outlive the run.
        callbacks: of the Fit.

    Attributes:
        args: the plan's arguments.
        placement: the module where it is trained; None before ``begin``.
        averages: what the updates since the last log noted.
        exchange: the ranks' message of an update.
        pace: measures how long this rank's own work takes; None on one rank.
        transaction: decides which updates are made.
        history: the file of its logs.
        rescue: saves the run where an exception ends it; None where that wasn't asked for.
        totals: adds up the run's numbers; None before training begins.
        watch: sees signals, hangs and other ranks' failures; there from the beginning of training.
        results: the numbers at the run's end.
        resumed_from: the checkpoint that it went on from; None where it began anew.
        epoch_index: whole passes over the data done.
        grad_norm: of the last update, on the device; None where gradients aren't clipped.
    """

    PHASES = {"backward": "backward", "clip": "gradients", "step": "optimizer"}

    def __init__(
        self,
        plan: Plan,
        strategy: Strategy,
        stream: DataStream,
        state: TrainState,
        control: Control,
        callbacks: Callbacks,
    ) -> None:
        self.plan, self.args, self.strategy, self.stream = plan, plan.args, strategy, stream
        self.state, self.control, self.callbacks = state, control, callbacks
        self.placement: Placement | None = None
        self.averages = Averages(strategy)
        several = strategy.world_size > 1
        self.pace = Pace(self.args, strategy.rank, strategy.world_size, strategy.forward_waits) if several else None
        self.exchange = UpdateExchange(strategy, control, InStep(strategy, "train_data"), self.pace)
        self.transaction = Transaction(self.args, strategy, stream.indices)
        saves = self.args.save_on_exception
        self.rescue = Rescue(strategy, stream, self.args.auto_find_batch_size) if saves else None
        self.history = checkpoint.LogHistory()
        self.totals: Totals | None = None
        self.results: dict[str, float] = {}
        self.resumed_from: Path | None = None
        self.epoch_index = 0
        self.grad_norm: Tensor | None = None
        self.watch: Watch
        self._schedule_is_due = False
        self._measure: Tensor | None = None  # of the last update's gradients; not finite where they aren't
        self._loss: Tensor | None = None  # of the last update, on this rank
        self._begin = 0  # the last update's first position
        self._attempted: Attempt | None = None  # the last update, where it isn't known yet whether it was made
        self._statistics: RunningStatistics | None = None
        self._earlier_samples = 0  # handed out in earlier epochs of this run, less those before a resume
        self._random_to_restore: dict[str, Any] | None = None
        self._scheduler: LRScheduler | None = None

    # What a run is made of.

    @property
    def module(self) -> TrainModule:
        """The module, placed."""
        assert self.placement is not None, "the module is placed when training begins"
        return self.placement.module

    @property
    def optimizer(self) -> Optimizer:
        """The strategy's optimizer."""
        assert self.placement is not None, "the optimizer is made when training begins"
        return self.placement.optimizer

    @property
    def scheduler(self) -> LRScheduler:
        """The schedule of the learning rate."""
        assert self._scheduler is not None, "the schedule is made when training begins"
        return self._scheduler

    @property
    def samples(self) -> int:
        """The samples that it handed out; those before a resume are not among them."""
        return self._earlier_samples + self.stream.samples

    # Where it begins.

    def begin(self, placement: Placement, has_evaluations: bool) -> None:
        """Take the place where the module is trained, and make the schedule.

        Args:
            placement: its optimizer was reset.
            has_evaluations: whether the run evaluates.
        """
        self.placement = placement
        self.transaction.say_what_it_cannot(placement.optimizer)
        self._scheduler = configured_scheduler(placement.module, placement.optimizer, self.args, has_evaluations)

    def begin_anew(self) -> None:
        """Stand at the beginning of the data, with the seed's random numbers."""
        self.stream.begin_anew()
        random_state.seed_everything(self.args.seed + self.strategy.data_rank)
        self.strategy.seed(self.args.seed)
        self._note_beginning()

    def go_on_from(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Stand where a checkpoint was saved.

        Args:
            path: the checkpoint, verified.
            saved: its state, see ``checkpoint.read_state``.

        Raises:
            CheckpointError: it belongs to another model or run.
        """
        self.resumed_from = path
        self._random_to_restore = checkpoint.restore(self, path, saved)
        self._restore_history(path, saved)
        if self.args.ignore_data_skip:
            self.stream.begin_anew()
        self.stream.load_own_state(self._random_to_restore.get("data"))
        self._note_beginning()

    def _restore_history(self, path: Path, saved: Mapping[str, Any]) -> None:
        found = checkpoint.read_history(path, saved)
        self.state.load_history(found.entries)
        self.history.go_on_from(found)
        if found.problem is not None and self.strategy.is_main:
            say(f"{found.problem} The run goes on.", sys.stderr)

    def _note_beginning(self) -> None:
        self.state.begin(self.plan.num_train_epochs, self.args.max_steps, self.plan.found_batch_size)
        if self.state.global_step >= self.state.max_steps:  # finished: no epoch follows, which would restore it
            self.restore_random_state()
        self._earlier_samples = -self.stream.samples  # so that the sum of the two is what this run handed out

    def restore_random_state(self) -> None:
        """Restore the random state that a checkpoint held, once the data stands where it stood: reading ahead draws."""
        random, self._random_to_restore = self._random_to_restore, None
        if random is not None:
            random_state.restore(random)
            self.strategy.restore_random_state(random)

    # What happens in it.

    def check_callbacks(self) -> None:
        """Refuse a callback's state that no checkpoint can hold, when training begins and not at the first save.

        Raises:
            TypeError: names the callback, and the entry.
        """
        if self.callbacks.stateful():
            checkpoint.check_states(self.callbacks.state_dict())

    def begin_epoch(self, epoch: int) -> None:
        """Have the data begin an epoch, and count its micro-batches anew."""
        self.epoch_index = epoch
        self.stream.begin_training_epoch(epoch)
        self.exchange.data.begin_epoch()

    def begin_next_epoch(self) -> None:
        """Stand at the beginning of the next epoch: a checkpoint saved from here on continues there."""
        self.epoch_index += 1
        self._earlier_samples += self.stream.samples
        self.stream.rewind()
        if self.rescue is not None:
            self.rescue.note_position()

    def begin_update(self, position: int) -> None:
        """Note where in the data an update's samples begin."""
        self._begin = position
        if self._statistics is not None:
            self._statistics.keep(self.state.global_step + 1)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a micro-batch's loss."""
        pace = self.pace
        if pace is None:
            self.strategy.backward(loss)
            return
        pace.begin_backward()
        self.strategy.backward(loss)
        pace.end_backward()

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
        optimizer = self.strategy.optimizer
        assert optimizer is not None
        self.state.begin_step(optimizer.param_groups[0]["lr"])
        self._loss = loss
        refused = self.transaction.judge(self._measure)
        if refused is False:
            self.strategy.step()
        elif refused is True:
            self.strategy.skip()
        else:
            self.strategy.step(refused)
        self._schedule_is_due = True

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
        self._schedule_is_due = True

    def settle_known_schedule(self) -> None:
        """Settle the schedule at once, where the host knows already whether the update was made."""
        if self.transaction.on_host and self.strategy.precision.skip_is_known():
            self.settle_schedule()

    def settle_schedule(self) -> None:
        """Move the schedule for the last update, or count it as skipped, once it is known which."""
        if self._schedule_is_due:
            self._schedule_is_due = False
            scheduler, transaction = self._scheduler, self.transaction
            assert scheduler is not None
            if transaction.was_skipped():
                attempt = self._attempted or self._attempt()
                self.state.skip_update()
                if self._statistics is not None:
                    self._statistics.give_back(attempt.update)
                transaction.note_skipped(attempt)
                return
            if transaction.in_a_row:
                transaction.end_row()
            if not waits_for_metric(scheduler):
                scheduler.step()

    def _attempt(self) -> Attempt:
        """The update that is under way, for who may have to say that it wasn't made."""
        assert self._loss is not None
        transaction, stream = self.transaction, self.stream
        suspects = transaction.suspects
        if suspects is None and transaction.on_host and self.strategy.precision.judges_gradients:
            suspects = self.strategy.suspects()
        spike = transaction.spikes.describe() if transaction.is_spike and transaction.spikes else None
        update = self.state.global_step + 1
        return Attempt(
            update, self.epoch_index, self._begin, stream.position, self.grad_norm, self._loss, suspects, spike
        )

    def end_update(self, loss: Tensor) -> None:
        """Count an update, whose loss over this rank is a 0-dim tensor on the device.

        Raises:
            SkippedUpdatesError: too many updates in a row were not made; on every rank.
        """
        self.averages.end_update(loss)
        if self._schedule_is_due:
            self._attempted = self._attempt()
        self.state.end_update(self.epoch_index + self.stream.fraction())
        if self.rescue is not None:
            self.rescue.end_update()
        if self.transaction.must_end:
            self.end_if_it_must()

    def report_updates(self) -> None:
        """Say which updates were left out since this was called last, the last update included. Collective."""
        self.settle_schedule()
        if not self.transaction.on_host:
            self.transaction.look_at_scale()
        self.transaction.say()

    def end_if_it_must(self) -> None:
        """End the run where too many updates in a row were left out.

        Raises:
            SkippedUpdatesError: on every rank; says how it began.
        """
        if self.transaction.must_end:
            raise self.transaction.failure()

    def begin_training(self, watch: Watch) -> None:
        """Begin to measure: everything is placed and restored."""
        self.watch = watch
        watch.begin_training()
        if not self.strategy.compiles_updates:
            self._statistics = running_statistics(self.module, 1 if self.transaction.on_host else 2)
        self.totals = Totals(self.args, self.state, self.averages, self.strategy)

    def training_log(self) -> dict[str, float]:
        """The numbers of a training log; empty where no update was made since the last one."""
        assert self.totals is not None
        logs = self.totals.training_log(self.grad_norm)
        return {**logs, **self.pace.take()} if logs and self.pace is not None else logs

    def finish(self, flops_per_token: float, memory: MemoryByStage) -> dict[str, float]:
        """The run's totals, once its last update is over.

        Args:
            flops_per_token: operations of forward and backward for a token, or an item where none are counted.
            memory: its report is part of them.
        """
        assert self.totals is not None
        self.results = self.totals.final_metrics(self.samples, flops_per_token) | memory.report()
        return self.results

    # What a checkpoint holds of it.

    def take_history(self) -> checkpoint.HistoryPart | None:
        """The logs so far, as a checkpoint holds them; None where this isn't the main process, which writes them."""
        return self.history.take(self.state.log_history) if self.strategy.is_main else None

    def fingerprints(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fingerprints of frozen tensors, by name. Collective."""
        assert self.placement is not None
        return self.placement.fingerprints(tensors)

    def state_dict(self) -> dict[str, Any]:
        """All that changes between two updates, but tensors, as JSON types. Collective: means are summed over ranks."""
        stream = self.stream
        return {
            "averages": self.averages.state_dict(),
            "transaction": self.transaction.state_dict(),
            "progress": self.state.to_dict(),
            "data": {"epoch": self.epoch_index, **stream.state_dict(), **stream.describe(self.strategy.is_main)},
            "scheduler": self.scheduler.state_dict(),
        }

    def rank_state(self) -> dict[str, Any]:
        """What of the state is this rank's alone, as JSON types: where it stands in a part of the data of its own."""
        own = self.stream.own_state()
        return {} if own is None else {"data": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, but for the schedule, which is checked as it is loaded and comes first
        (``checkpoint/parts.py``).
        """
        self.averages.load_state_dict(state["averages"])
        if "transaction" in state:  # earlier versions left no update out
            self.transaction.load_state_dict(state["transaction"])
        self.state.load(state["progress"])
        self.epoch_index = state["data"]["epoch"]
        self.stream.load_state_dict(state["data"])
