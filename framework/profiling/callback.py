"""Profiling: has the windows of a profiler's schedule be looked at, and closes what is open however a run ends.

Nothing is wrapped but the beginning of an update while a window is awaited, and nothing at all once the last one is
over.
"""

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..arguments import FitArguments
from ..callbacks import Callback
from ..printing import say
from ..run.out_of_memory import is_out_of_memory
from ..state import Control, TrainState
from .options import Profiler, TorchProfiler
from .recording import Recording
from .window import Window

READING = "get_batch_samples"  # an update begins with it
NOTHING = nullcontext()
ANOTHER = "Another torch.profiler was recording: there is no trace."
ALLOCATIONS_KEPT = 100_000  # of the history that a memory snapshot shows


class ProfileWarning(UserWarning):
    """A profile that was asked for and isn't there. The run goes on."""


def warn_of(failure: Exception) -> None:
    """Say that a profile was lost."""
    warnings.warn(f"The profile was lost: {type(failure).__name__}: {failure}", ProfileWarning, stacklevel=3)


class Profiling(Callback):
    """Looks at some updates of a run.

    Args:
        options: of the profiler.

    Attributes:
        window: the one that is open, if any.
        probe: the recording of the last warm-up update, while that is under way.
    """

    def __init__(self, options: Profiler) -> None:
        self.options = options
        self.fit: Any = None
        self.window: Window | None = None
        self.probe: Recording | None = None
        self.stood = self.updates = self.probed = 0
        self.keeps_history = False

    # Events.

    def on_init_end(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """Refuse ranks that aren't there, and a snapshot where there is none to take."""
        options, world = self.options, fit.strategy.world_size
        missing = [rank for rank in options.ranks if rank >= world]
        if missing:
            raise ValueError(
                f"profiler={options!r}: there is no rank {missing[0]}, ranks are 0 to {world - 1}. Leave it out."
            )
        if self.wants_snapshot and fit.strategy.device.type != "cuda":
            raise ValueError(
                f"TorchProfiler(memory_snapshot=True) needs CUDA, whose allocator keeps a history, and this run is on "
                f"{fit.strategy.device.type!r}. Leave it out; memory=True records allocations anywhere."
            )

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Await the first window."""
        self.finish(fit)
        self.fit, self.stood, self.updates = fit, -1, 0
        if self.wants_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS_KEPT)
            self.keeps_history = True
        options, left = self.options, state.max_steps - state.global_step
        if isinstance(options, TorchProfiler) and 0 < left <= options.wait + options.warmup and fit.strategy.is_main:
            warnings.warn(
                f"profiler={options!r} looks at nothing: the run ends after {left} updates, before the first that it "
                f"would record, the {options.wait + options.warmup + 1}th. Write a shorter wait or warmup.",
                ProfileWarning,
                stacklevel=2,
            )
        elif fit.strategy.rank in options.ranks and left > 0:
            fit.begin_labels(self.within, [READING])

    def on_train_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Close what is open."""
        self.end_history()
        self.finish(fit)

    def on_exception(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        exception: BaseException,
        **context: Any,
    ) -> None:
        """Close what is open, and write what there is of it. The exception is the one to show, so nothing is raised."""
        try:
            if self.keeps_history and is_out_of_memory(exception):
                path = self.directory_of(args) / f"memory-rank{fit.strategy.rank}.pickle"
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(path))
                say(f"The history of allocations is in {path}; https://pytorch.org/memory_viz shows it.", sys.stderr)
            self.end_history()
            if self.window is not None:
                self.window.notes.append(f"The run ended in update {self.window.last}: {type(exception).__name__}.")
            self.finish(fit)
        except Exception as failure:
            warn_of(failure)

    # Updates.

    def within(self, phase: str) -> AbstractContextManager[None]:
        """Make what is entered around a phase; what reads an update's data begins the update."""
        if phase == "data" and self.fit.state.global_step != self.stood:
            self.stood = self.fit.state.global_step
            self.begin_update(self.stood + 1)
        if self.window is not None:
            return self.window.within(phase)
        self.probed += phase == "forward"
        return NOTHING

    def begin_update(self, update: int) -> None:
        """Open and close what is due before an update.

        Args:
            update: its number, from 1.
        """
        options, place = self.options, self.updates
        self.updates += 1
        if not isinstance(options, TorchProfiler):
            if self.window is None:
                self.label_all()
                self.window = Window(self.fit.strategy.rank, update)
            else:
                self.window.begin_update(update)
            return
        place %= options.cycle
        if place == 0 and self.window is not None:
            self.close_window()
            if self.updates > options.repeat * options.cycle:
                self.finish(self.fit)
                return
        before = options.wait + options.warmup
        if place == before - 1:
            self.label_all()
            self.probe, self.probed = self.start_recording(), 0
        elif place == before:
            self.open_window(options, update)
        elif place > before and self.window is not None:
            self.window.begin_update(update)

    def open_window(self, options: TorchProfiler, update: int) -> None:
        """Open a window, in which as much is recorded as its trace may hold."""
        rank, probe = self.fit.strategy.rank, self.probe
        self.probe = None
        if probe is None:
            self.window = Window(rank, update, notes=[ANOTHER])
            return
        probe.stop()
        counted = "forward" if self.probed else "data"  # a training_step of the user's may have a forward of its own
        size = probe.bytes_per_event * probe.events / max(1, self.probed)
        allowed = int(options.max_bytes / size) if size else None
        top = probe.top() if allowed == 0 else []
        del probe  # its events take a while to go, which isn't the window's time
        if allowed == 0:
            what = "a forward with what belongs to it" if counted == "forward" else "an update"
            note = (
                f"There is no trace: {what} makes about {size / 1e6:.3g} MB of it, and max_bytes is "
                f"{options.max_bytes / 1e6:.3g} MB."
            )
            self.window = Window(rank, update, top=top, notes=[note])
        else:
            recording = self.start_recording()
            self.window = Window(
                rank, update, recording, allowed, counted, notes=[] if recording is not None else [ANOTHER]
            )

    def start_recording(self) -> Recording | None:
        """Begin to record; None where another profiler does."""
        assert isinstance(self.options, TorchProfiler)
        recording = Recording(self.options)
        try:
            recording.start()
        except RuntimeError:
            return None
        return recording

    def label_all(self) -> None:
        """Have every phase be entered through ``within``."""
        self.fit.begin_labels(self.within)
        self.fit.run.begin_labels(self.within)

    def close_window(self) -> None:
        """Close the window, and write what it has found."""
        window, self.window = self.window, None
        if window is None:
            return
        self.fit.run.end_labels()
        self.fit.begin_labels(self.within, [READING])
        window.end()
        options = self.options
        limit = options.max_bytes if isinstance(options, TorchProfiler) else 0
        rank = self.fit.strategy.rank
        try:
            line = window.write(self.directory_of(self.fit.args), limit, rank == min(options.ranks))
        except Exception as failure:  # a full disk, a fault of torch's profiler: on this rank alone perhaps
            warn_of(failure)
            return
        if self.fit.strategy.is_main:
            say(line)

    def finish(self, fit: Any) -> None:
        """Close what is open, and unwrap everything."""
        probe, self.probe = self.probe, None
        try:
            if probe is not None:
                probe.stop()
            self.close_window()
        finally:
            fit.end_labels()
            fit.run.end_labels()
            self.fit = None

    def end_history(self) -> None:
        """Have the allocator keep no history any more."""
        if self.keeps_history:
            self.keeps_history = False
            torch.cuda.memory._record_memory_history(enabled=None)

    @property
    def wants_snapshot(self) -> bool:
        """Whether the history of allocations is kept."""
        return isinstance(self.options, TorchProfiler) and self.options.memory_snapshot

    def directory_of(self, args: FitArguments) -> Path:
        """Return where the profile of a run goes."""
        given = self.options.directory
        return Path(given).expanduser() if given is not None else Path(args.output_dir) / "profile"
