"""The display of a run, on the main process: what it is, how far it is, and how it ended."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..arguments import FitArguments
from ..callbacks import Callback
from ..measures.items import name_of_items
from ..printing import FAILURES, give_up
from ..state import Control, TrainState
from .clock import Clock
from .header import Rows, beginning, ending
from .notebook import Notebook, in_notebook
from .numbers import format_count, format_logs
from .screens import Lines, Status
from .terminal import Terminal

SAVED_EVERY = 30.0  # seconds between two lines that say that checkpoints were saved


class Progress(Callback):
    """Shows a run in a terminal, in a notebook, or in plain lines.

    Between logs the callback only looks at the clock, where the screen is a live one. Where nothing can be shown any
    more (a closed pipe, a lost terminal, a full disk), the display ends and the run goes on.
    """

    def __init__(self) -> None:
        self.screen = Lines()
        self.is_live = False
        self.is_quiet = False  # whether the display has failed, and stays off for the rest of the run
        self.clock = Clock(time.monotonic())
        self.logs: dict[str, str] = {}
        self.rate = self.note = ""
        self.drawn = 0.0
        self.first = 0  # updates that were done where the run began or was resumed

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Say what the run is, and start the display."""
        now = time.monotonic()
        self.clock, self.drawn = Clock(now), now
        self.first = state.global_step
        self.logs, self.rate, self.note = {}, "", ""
        self.items_at_begin = self.items_logged = state.items_seen
        self.logged = state.global_step
        self.item_name = "samples"
        self.evaluated = False
        self.saved, self.saved_at = 0, -SAVED_EVERY
        self.is_quiet = sys.stdout is None or sys.stdout.closed
        if self.is_quiet:
            return
        self.screen = choose_screen()
        with self.shown():
            self.screen.begin(described(beginning, fit), self.status(args, state))
        self.is_live = self.screen.is_live and not self.is_quiet
        fit.callbacks.listen("on_step_begin", self)

    def on_step_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Start the clock with the first update after a pause, and hear no more of updates that begin."""
        if state.global_step > self.first:
            self.clock.start(time.monotonic(), state.global_step, self.evaluated)
            self.evaluated = False
            fit.callbacks.stop_listening("on_step_begin", self)
            fit.callbacks.listen("on_prediction_step", self)

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Redraw a live screen where the last picture is old enough."""
        if self.is_live and time.monotonic() - self.drawn > self.screen.seconds:
            self.draw(args, state)

    def on_prediction_step(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Stop the clock at an evaluation, and hear no more of its batches."""
        self.pause(state, fit)
        fit.callbacks.stop_listening("on_prediction_step", self)

    def on_log(
        self,
        args: FitArguments,
        state: TrainState,
        control: Control,
        *,
        fit: Any,
        logs: dict[str, float],
        **context: Any,
    ) -> None:
        """Show the new numbers. A run's totals are shown at its end, in other words."""
        if self.is_quiet or "train_runtime" in logs:
            return
        shown = format_logs(logs)
        is_training = "loss" in logs
        if is_training:
            self.pause(state, fit)
            self.logs, self.rate = shown, self.find_rate(state, fit)
        with self.shown():
            self.drawn = time.monotonic()
            self.screen.log(self.status(args, state), shown, is_training)

    def on_evaluate(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Note that the pause under way is one of an evaluation."""
        self.evaluated = True

    def on_save(self, args: FitArguments, state: TrainState, control: Control, *, path: Path, **context: Any) -> None:
        """Say that a checkpoint was saved: where saves follow one another closely, of several at once."""
        self.saved += 1
        verb = "being written" if args.async_save else "saved"
        self.note = f"{path.name} {verb}"
        now = time.monotonic()
        if self.is_quiet or now - self.saved_at < SAVED_EVERY:
            return
        more = f", and {format_count(self.saved - 1)} before it" if self.saved > 1 else ""
        self.saved, self.saved_at = 0, now
        with self.shown():
            self.screen.show([(verb, f"{path}{more}")])

    def on_train_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Leave the finished bar standing, and say how the run ended."""
        self.is_live = False
        if not self.is_quiet:
            seconds = time.monotonic() - self.clock.began
            with self.shown():
                rows = described(partial(ending, first=self.first, seconds=seconds, item_name=self.item_name), fit)
                self.screen.end(rows, replace(self.status(args, state), left=None))
        self.screen = Lines()

    def on_exception(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Give the terminal back before the traceback is shown."""
        self.is_live = False
        if not self.is_quiet:
            with self.shown():
                self.screen.close()
        self.screen = Lines()

    # What is shown.

    def pause(self, state: TrainState, fit: Any) -> None:
        """Stop the clock until the next update begins."""
        self.clock.stop(time.monotonic(), state.global_step)
        fit.callbacks.listen("on_step_begin", self)

    def find_rate(self, state: TrainState, fit: Any) -> str:
        """What was trained on in a second since the last log, by what it is; "" before the second update."""
        items = state.items_seen - self.items_at_begin
        self.item_name = name_of_items(fit.module, items, fit.run.samples)
        updates = max(1, state.global_step - self.logged)
        per_update = (state.items_seen - self.items_logged) / updates
        self.items_logged, self.logged = state.items_seen, state.global_step
        seconds = self.clock.last_seconds_per_update()
        return f"{format_count(per_update / seconds)} {self.item_name}/s" if seconds else ""

    def status(self, args: FitArguments, state: TrainState) -> Status:
        """How far the run is."""
        now = time.monotonic()
        return Status(
            name=args.run_name or "",
            update=state.global_step,
            updates=state.max_steps,
            epoch=state.epoch,
            logs=self.logs,
            rate=self.rate,
            elapsed=now - self.clock.began,
            left=self.clock.seconds_left(now, state, args),
            note=self.note,
        )

    def draw(self, args: FitArguments, state: TrainState) -> None:
        """Redraw the bar."""
        self.drawn = time.monotonic()
        with self.shown():
            self.screen.draw(self.status(args, state))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Entered around drawing; where that fails, the display ends for the rest of the run."""
        try:
            yield
        except FAILURES as error:
            self.is_quiet, self.is_live = True, False
            with suppress(Exception):  # it puts back sys.stdout and sys.stderr, which it had replaced, before it fails
                self.screen.close()
            give_up(sys.stdout, error)


def choose_screen() -> Lines:
    """The screen that standard output is: a notebook, a terminal, or anything else."""
    if in_notebook():
        return Notebook()
    return Terminal() if sys.stdout.isatty() else Lines()


def described(describe: Any, fit: Any) -> Rows:
    """What is to be said of a run, or why it can't be said: no run ends because it couldn't be described."""
    try:
        rows: Rows = describe(fit)
        return rows
    except Exception as error:
        return [("run", f"it can't be described here ({type(error).__name__}: {error})")]
