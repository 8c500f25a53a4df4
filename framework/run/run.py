"""Run: all that changes between two updates, and so all that a checkpoint holds but tensors."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...strategies.base import Strategy
from .. import checkpoint, random_state
from ..callbacks import Callbacks
from ..data import DataStream
from ..labelling import Label, Labelled
from ..measures.averages import Averages
from ..measures.memory import MemoryByStage
from ..module import TrainModule
from ..printing import say
from ..state import Control, TrainState
from ..turns import Turns
from ..watch.watch import Watch
from .configured import configured_schedulers
from .exchange import UpdateExchange
from .in_step import InStep
from .pace import Pace
from .placement import Placement
from .plan import Plan
from .rescue import Rescue
from .statistics import RunningStatistics, running_statistics
from .stepping import Stepping, TurnStepping
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
        turns: of the module; None where it has one optimizer.

    Attributes:
        args: the plan's arguments.
        placement: the module where it is trained; None before ``begin``.
        averages: what the updates since the last log noted.
        exchange: the ranks' message of an update.
        pace: measures how long this rank's own work takes; None on one rank.
        steppings: what ends an update, for each turn by its name; "" is that of a run without turns.
        stepping: the first of them.
        history: the file of its logs.
        rescue: saves the run where an exception ends it; None where that wasn't asked for.
        totals: adds up the run's numbers; None before training begins.
        watch: sees signals, hangs and other ranks' failures; there from the beginning of training.
        results: the numbers at the run's end.
        resumed_from: the checkpoint that it went on from; None where it began anew.
        epoch_index: whole passes over the data done.
        begins_at: the first position of the samples that are trained on.
        attempts: numbers an update, or each turn of it, for who must take one back.
    """

    PHASES = {"backward": "backward"}

    def __init__(
        self,
        plan: Plan,
        strategy: Strategy,
        stream: DataStream,
        state: TrainState,
        control: Control,
        callbacks: Callbacks,
        turns: Turns | None = None,
    ) -> None:
        self.plan, self.args, self.strategy, self.stream = plan, plan.args, strategy, stream
        self.state, self.control, self.callbacks = state, control, callbacks
        self.placement: Placement | None = None
        self.averages = Averages(strategy)
        several = strategy.world_size > 1
        self.pace = Pace(self.args, strategy.rank, strategy.world_size, strategy.forward_waits) if several else None
        self.exchange = UpdateExchange(strategy, control, InStep(strategy, "train_data"), self.pace)
        self.turns = turns
        self.epoch_index = self.begins_at = self.attempts = 0
        self.steppings: dict[str, Stepping] = {}
        for turn in turns or ():
            self.steppings[turn.name] = TurnStepping(self, turn.arguments(self.args), turn.name)
        if turns is None:
            self.steppings[""] = Stepping(self, self.args)
        self.stepping = next(iter(self.steppings.values()))
        saves = self.args.save_on_exception
        self.rescue = Rescue(strategy, stream, self.args.auto_find_batch_size) if saves else None
        self.history = checkpoint.LogHistory()
        self.totals: Totals | None = None
        self.results: dict[str, float] = {}
        self.resumed_from: Path | None = None
        self.watch: Watch
        self._statistics: RunningStatistics | None = None
        self._earlier_samples = 0  # handed out in earlier epochs of this run, less those before a resume
        self._random_to_restore: dict[str, Any] | None = None
        self._last_taken_back = 0

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
        """The schedule of the learning rate; of several turns, the first one's."""
        return self.stepping.scheduler

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizer of each turn; that of a run without turns by the name ""."""
        assert self.placement is not None, "the optimizer is made when training begins"
        return self.placement.optimizers

    @property
    def schedules(self) -> dict[str, LRScheduler]:
        """The schedule of each turn; that of a run without turns by the name ""."""
        return {name: stepping.scheduler for name, stepping in self.steppings.items()}

    @property
    def transaction(self) -> Transaction:
        """Decides which updates are made; of several turns, the first one's."""
        return self.stepping.transaction

    @property
    def grad_norm(self) -> Tensor | None:
        """Of the last update, on the device; of several turns, the first one's. None where gradients aren't clipped."""
        return self.stepping.grad_norm

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
        optimizers = placement.optimizers
        schedules = configured_schedulers(placement.module, optimizers, self.args, self.turns, has_evaluations)
        for name, stepping in self.steppings.items():
            stepping.begin(optimizers[name], schedules[name])

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

    def begin_labels(self, label: Label, methods: Iterable[str] | None = None) -> None:
        """Label the phases of what ends updates, too."""
        super().begin_labels(label, methods)
        for stepping in self.steppings.values():
            stepping.begin_labels(label)

    def end_labels(self) -> None:
        """Have all methods be what they were."""
        super().end_labels()
        for stepping in self.steppings.values():
            stepping.end_labels()

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
        self.begins_at = position
        if self.turns is None:
            self.attempts = self.state.global_step + 1
            if self._statistics is not None:
                self._statistics.keep(self.attempts)

    def begin_turn(self) -> None:
        """Note that a turn of an update begins."""
        self.attempts += 1
        if self._statistics is not None:
            self._statistics.keep(self.attempts)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a micro-batch's loss."""
        pace = self.pace
        if pace is None:
            self.strategy.backward(loss)
            return
        pace.begin_backward()
        self.strategy.backward(loss)
        pace.end_backward()

    def take_back(self, attempt: Attempt) -> None:
        """Count an update that was left out, in part perhaps, and forget what its forward left."""
        if self._last_taken_back != attempt.update:  # several turns of it may be
            self._last_taken_back = attempt.update
            self.state.skip_update()
        if self._statistics is not None:
            self._statistics.give_back(attempt.number)

    def end_update(self, loss: Tensor) -> None:
        """Count an update, whose loss over this rank is a 0-dim tensor on the device.

        Raises:
            SkippedUpdatesError: too many updates in a row were not made; on every rank.
        """
        stepping = self.stepping
        self.averages.end_update(loss)
        if stepping.schedule_is_due:
            stepping.note_attempt()
        self.state.end_update(self.epoch_index + self.stream.fraction())
        if self.rescue is not None:
            self.rescue.end_update()
        if stepping.transaction.must_end:
            self.end_if_it_must()

    def end_round(self) -> None:
        """Count an update that was made in turns.

        Raises:
            SkippedUpdatesError: a turn was left out too often in a row; on every rank.
        """
        self.averages.end_round()
        for stepping in self.steppings.values():
            assert isinstance(stepping, TurnStepping)
            stepping.end_round()
        self.state.end_update(self.epoch_index + self.stream.fraction())
        if self.rescue is not None:
            self.rescue.end_update()
        self.end_if_it_must()

    def settle_schedule(self) -> None:
        """Move the schedules for the last update, or count it as skipped."""
        for stepping in self.steppings.values():
            if stepping.schedule_is_due:
                with stepping.at_work():
                    stepping.settle_schedule()

    def report_updates(self) -> None:
        """Say which updates were left out since this was called last, the last update included. Collective."""
        for stepping in self.steppings.values():
            with stepping.at_work():
                stepping.settle_schedule()
                if not stepping.transaction.on_host:
                    stepping.transaction.look_at_scale()
                stepping.transaction.say()

    def end_if_it_must(self) -> None:
        """End the run where too many updates in a row were left out.

        Raises:
            SkippedUpdatesError: on every rank; says how it began.
        """
        for stepping in self.steppings.values():
            if stepping.transaction.must_end:
                raise stepping.transaction.failure()

    def begin_training(self, watch: Watch) -> None:
        """Begin to measure: everything is placed and restored."""
        self.watch = watch
        watch.begin_training()
        if not self.strategy.compiles_updates:
            # An accelerator's host learns of an update, or of a turn of it, only when the next of its kind is made.
            under_way = 1 if self.turns is None else self.turns.made
            self._statistics = running_statistics(self.module, 1 if self.transaction.on_host else 1 + under_way)
        self.totals = Totals(self.args, self.state, self.averages, self.strategy)

    def training_log(self) -> dict[str, float]:
        """The numbers of a training log; empty where no update was made since the last one."""
        assert self.totals is not None
        logs = self.totals.training_log(self.steppings)
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
        steppings = {name: stepping.state_dict() for name, stepping in self.steppings.items()}
        return {
            "averages": self.averages.state_dict(),
            **(steppings[""] if self.turns is None else {"scheduler": {}, "turns": self.turns.saved_with(steppings)}),
            "progress": self.state.to_dict(),
            "data": {"epoch": self.epoch_index, **stream.state_dict(), **stream.describe(self.strategy.is_main)},
        }

    def rank_state(self) -> dict[str, Any]:
        """What of the state is this rank's alone, as JSON types: where it stands in a part of the data of its own."""
        own = self.stream.own_state()
        return {} if own is None else {"data": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, but for the schedules, which are checked as they are loaded and come
        first (``checkpoint/parts.py``).
        """
        self.averages.load_state_dict(state["averages"])
        for name, stepping in self.steppings.items():
            stepping.load_state_dict(state["turns"]["steppings"][name] if name else state)
        self.state.load(state["progress"])
        self.epoch_index = state["data"]["epoch"]
        self.stream.load_state_dict(state["data"])
