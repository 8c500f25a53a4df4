"""Playing one rank: a Fit is made and placed, and makes a few updates, with tensors that have no memory."""

import gc
import linecache
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...precision.quantized import scales
from ...strategies.local_parts import local_part
from ...strategies.played import Stage
from ..averaging import Average
from ..rounds import Rounds
from ..run.run import Run
from ..turns import Turns
from ..watch.watch import Watch
from .account import Account, Peak, find_peak, moments, sum_up
from .batches import of_samples, samples_in
from .growth import Line, lines_of
from .recording import (
    AVERAGES,
    BUFFERS,
    FROZEN,
    GRADIENTS,
    HOST_AVERAGES,
    MESSAGES,
    PARAMETERS,
    STATE,
    Recording,
)

if TYPE_CHECKING:
    from ..steps import Steps

MANY = 20_000  # storages that an update makes and frees; of a model with more, no other size is played
BY_ACTIVATIONS = "The largest micro-batch follows from the activations of one sample, since the model is large."
OURS = Path(__file__).resolve().parents[2]


class Player:
    """Plays one rank of a run.

    Args:
        fit: its strategy is played, and set up.
        stage: of the strategy.
        ranks_per_node: ranks that share a node.
    """

    def __init__(self, fit: "Steps", stage: Stage, ranks_per_node: int) -> None:
        self.fit, self.stage, self.ranks_per_node = fit, stage, ranks_per_node
        self.strategy = fit.strategy
        self.recording = Recording()
        self.account = Account(self.strategy.rank)

    def play(self) -> Account:
        """Place the module and make updates.

        Raises:
            ValueError: it can't be placed; names the line.
        """
        with self.stage, self.recording:
            try:
                self.begin()
            except (ValueError, TypeError, ImportError):
                raise
            except Exception as error:
                raise ValueError(f"The module can't be placed without memory: {where_it_stopped(error)}") from error
            batches = self.read()
            gc.freeze()  # what is there stays, and needn't be looked through at every turn
            try:
                self.update(batches)  # makes the optimizer's state
                self.update(batches, records=True)
            except Exception as error:
                self.account = replace(self.account, stopped=where_it_stopped(error))
                error.__traceback__ = None  # its frames hold the graph
                gc.collect()
                self.stand_still()
                return self.account
            self.account = replace(
                self.account,
                peak=self.peak(),
                traffic=self.traffic(),
                flops=dict(self.recording.flops),
            )
            self.grow(batches)
        return self.account

    def begin(self) -> None:
        """Place the module and begin the run."""
        fit = self.fit
        placement, run = fit.placement, fit.run
        fit.begin_counters()
        self.recording.name_layers(fit.module)
        placement.reset_optimizer(fit.args)
        run.begin(placement, has_evaluations=False)
        with self.stage.left():
            run.begin_anew()
        run.begin_training(Watch(fit.strategy, fit.args, fit.state, None))
        placement.mode.train()
        self.strategy.model.train()
        self.averages = [each for each in fit.callbacks.all if isinstance(each, Average)]
        for average in self.averages:
            average.on_train_begin(fit.args, fit.state, fit.control, fit=fit)
        self.trainable = [p for p in self.strategy.named_parameters().values() if p.requires_grad]
        self.rounds = None if run.turns is None else PlayedRounds(fit, run, run.turns, self.note_gradients)
        batches = 1 if run.turns is None else run.turns.batches
        self.batches_to_read = batches * fit.args.gradient_accumulation_steps

    def read(self) -> list[Any]:
        """Read the micro-batches of the first update, for real."""
        fit, run = self.fit, self.fit.run
        with self.stage.left():
            run.begin_epoch(0)
            batches = fit.batches(run.stream, 0)
            found = [batch for _, batch in zip(range(self.batches_to_read), batches, strict=False)]
        if not found:
            raise ValueError("train_data gave no batch.")
        self.account = replace(
            self.account,
            samples=samples_in(found[0]) or fit.args.per_device_train_batch_size,
            accumulation=len(found),
            data_ranks=self.strategy.data_size,
        )
        return found

    def update(self, batches: list[Any], records: bool = False) -> None:
        """Make one update as the loop does; what it holds before its step is noted."""
        fit, strategy = self.fit, self.strategy
        self.note_state()
        if records:
            gc.collect()
            self.recording.begin()
        self.account = replace(self.account, gradients=0)
        if self.rounds is not None:
            following, most = iter(batches), fit.args.gradient_accumulation_steps
            micro_batches, num_items = fit.get_batch_samples(following, most, strategy.device)
            self.rounds.update(micro_batches, num_items, following, most)
        else:
            self.update_once(batches)
        self.recording.end()
        self.note_state()

    def update_once(self, batches: list[Any]) -> None:
        """Make the update of a module without turns."""
        fit, run, strategy = self.fit, self.fit.run, self.strategy
        micro_batches, num_items = fit.get_batch_samples(iter(batches), len(batches), strategy.device)
        update_loss: Tensor | None = None
        for index, inputs in enumerate(micro_batches, start=1):
            with fit.accumulate(index == len(micro_batches)):
                loss = fit.training_step(strategy.model, inputs, num_items)
            update_loss = loss if update_loss is None else update_loss + loss
        assert update_loss is not None
        run.stepping.clip(self.trainable)
        self.note_gradients()
        run.stepping.step(update_loss)
        run.stepping.settle_known_schedule()
        for parameter in self.trainable:
            parameter.grad = None
        strategy.flush()
        run.end_update(update_loss)

    def note_state(self) -> None:
        """Note what is held between two updates."""
        strategy, recording = self.strategy, self.recording
        named = strategy.named_parameters().values()
        apart = strategy.held_apart()
        kinds = {True: [p for p in named if p.requires_grad], False: [p for p in named if not p.requires_grad]}
        trained = [*map(local_part, kinds[True]), *apart.get(PARAMETERS, ())]
        frozen = [*map(local_part, kinds[False]), *scales(strategy.module), *apart.get(FROZEN, ())]
        state = strategy.stepping_optimizer().state.values()
        held = [local_part(v) for entries in state for v in entries.values() if isinstance(v, Tensor)]
        recording.note(MESSAGES, apart.get(MESSAGES, ()))
        averages = {
            on_host: [part for each in self.averages if (each.device is not None) == on_host for part in each.parts()]
            for on_host in (False, True)
        }
        self.account = replace(
            self.account,
            parameters=recording.note(PARAMETERS, trained),
            frozen_parameters=recording.note(PARAMETERS, frozen),
            buffers=recording.note(BUFFERS, map(local_part, strategy.module.buffers())),
            averaged_weights=recording.note(AVERAGES, averages[False]),
            optimizer_state=recording.note(STATE, [*held, *apart.get(STATE, ())]),
        )
        self.note_host(recording.note(HOST_AVERAGES, averages[True]))

    def note_gradients(self) -> None:
        """Note what the gradients of an update, or of the turn that has most of them, lie in."""
        gradients = [local_part(p.grad) for p in self.trainable if p.grad is not None]
        gradients += self.strategy.held_apart().get(GRADIENTS, ())
        size = self.recording.note(GRADIENTS, gradients)
        self.account = replace(self.account, gradients=max(self.account.gradients, size))

    def stand_still(self) -> None:
        """Count gradients and the optimizer's state where no update can be played: by gradients of zeros."""
        strategy: Any = self.strategy
        if self.rounds is None:
            self.step_by_zeros(self.trainable)
        else:
            for turn, parameters in self.rounds.parameters.items():
                with strategy.turn(turn):
                    self.step_by_zeros(parameters)
        self.note_state()

    def step_by_zeros(self, parameters: Sequence[nn.Parameter]) -> None:
        """Step parameters by gradients of zeros."""
        strategy: Any = self.strategy
        strategy.make_zero_gradients(parameters)
        self.note_gradients()
        strategy.step_by_zeros()
        for parameter in parameters:
            parameter.grad = None

    def note_host(self, averages: int) -> None:
        """Note what lies in the host's memory: averages of so many bytes, and what the strategy keeps there."""
        account = self.account
        sizes = {
            PARAMETERS: account.parameters + account.frozen_parameters,
            GRADIENTS: account.gradients,
            STATE: account.optimizer_state,
            HOST_AVERAGES: averages,
        }
        kinds = {*self.strategy.held_on_host, HOST_AVERAGES}
        on_host = {kind: size for kind, size in sizes.items() if kind in kinds and size}
        self.account = replace(account, on_host=on_host)

    def peak(self) -> Peak:
        """The peak of the device in what was recorded."""
        return find_peak(self.recording, self.strategy.held_on_host)

    def traffic(self) -> Any:
        """The messages of the recorded update."""
        mesh = getattr(self.strategy, "mesh", None)
        return sum_up(self.recording.messages, mesh, self.strategy.rank, self.ranks_per_node)

    def grow(self, batches: list[Any]) -> None:
        """Find out how the peak grows with the micro-batch, by an update of twice as many samples; of a large model, by
        the activations, since another update would take as long as the others did.
        """
        samples, peak = self.account.samples, self.account.peak
        assert peak is not None
        # An engine's gradients on their way into its shards can't be told from activations.
        if len(self.recording.events) > MANY and not self.strategy.held_apart():
            line = peak.bytes - peak.activations, peak.activations / samples
            self.account = replace(self.account, growth=[line], notes=[*self.account.notes, BY_ACTIVATIONS])
            return
        kept, found = self.account, list[Line]()
        smaller = self.bytes_held()
        try:
            with self.stage.left():  # they are the host's
                doubled = [of_samples(batch, samples, 2 * samples) for batch in batches]
            self.update(doubled, records=True)
            larger = self.bytes_held()
            if len(larger) != len(smaller):  # other operators: no moment is that of the other size
                smaller, larger = [peak.bytes], [self.peak().bytes]
            found = lines_of(smaller, larger, samples)
        except Exception:  # a batch whose samples can't be told apart
            pass
        self.account = replace(kept, growth=found)

    def bytes_held(self) -> list[int]:
        """The bytes that the device holds at each moment of what was recorded."""
        return [live for _, live, _ in moments(self.recording, self.strategy.held_on_host)]


class PlayedRounds(Rounds):
    """Makes updates in turns, and tells no callback of them.

    Args:
        steps, run, turns: see ``Rounds``.
        note_gradients: called when a turn has its gradients.
    """

    def __init__(self, steps: "Steps", run: Run, turns: Turns, note_gradients: Callable[[], None]) -> None:
        super().__init__(steps, run, turns)
        self.note_gradients = note_gradients

    def tell(self, event: str, **about: Any) -> None:
        """Note gradients where callbacks would see them."""
        if event == "on_pre_optimizer_step":
            self.note_gradients()


def where_it_stopped(error: BaseException) -> str:
    """Say what stopped a played update, and at which line of the user's program."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [
        frame
        for frame in frames
        if not Path(frame.filename).resolve().is_relative_to(OURS / "framework")
        and not Path(frame.filename).resolve().is_relative_to(OURS / "strategies")
        and "site-packages" not in frame.filename
        and not frame.filename.startswith("<")
    ]
    frame = (outside or list(frames))[-1]
    line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
    said = " ".join(str(error).split())[:200]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {line} ({type(error).__name__}: {said})"
