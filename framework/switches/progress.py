"""The progress display: a live bar in a terminal, a plain line per log elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..arguments import FitArguments
from ..callbacks import Callback
from ..printing import FAILURES, give_up, say
from ..state import Control, TrainState


class Progress(Callback):
    """Shows update, loss, learning rate, items per second and time left, on the main process.

    Between logs the callback only looks at the clock; the bar is redrawn at most ``PER_SECOND`` times a second. Where
    nothing can be shown any more (a closed pipe, a lost terminal, a full disk), the display ends and the run goes on.
    """

    PER_SECOND = 8

    def __init__(self) -> None:
        self.bar: Any = None
        self.live = False
        self.is_quiet = False  # whether the display has failed, and stays off for the rest of the run

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Start the display and the clock."""
        self.began = self.drawn = time.monotonic()
        self.first_step, self.first_items = state.global_step, state.items_seen
        self.rate = ""
        self.item_name = getattr(fit.module, "item_name", "samples")
        self.loss = ""
        self.is_quiet = sys.stdout is None or sys.stdout.closed
        self.live = not self.is_quiet and sys.stdout.isatty()
        if self.live:
            with self.shown():
                self.start(args, state)

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Redraw the bar where the last picture is old enough."""
        self.draw_in_time(state)

    def on_log(
        self, args: FitArguments, state: TrainState, control: Control, *, logs: dict[str, float], **context: Any
    ) -> None:
        """Take in the new numbers, and print them where there is no terminal."""
        if self.is_quiet:
            return
        shown = " | ".join(f"{name.replace('_', ' ')} {logs[name]:.4g}" for name in logs if name not in HIDDEN)
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
            elapsed = max(1e-9, time.monotonic() - self.began)
            self.rate = f"{(state.items_seen - self.first_items) / elapsed:,.0f} {self.item_name}/s"
        if self.live:
            if "loss" not in logs:
                with self.shown():
                    self.bar.console.print(f"update {state.global_step}: {shown}", highlight=False)
            self.draw_in_time(state)
        else:
            line = (
                f"{f'{args.run_name} ' if args.run_name else ''}update {state.global_step}/{state.max_steps} | {shown}"
            )
            if "loss" in logs:
                line += f" | {self.rate} | {self.time_left(state)} left"
            self.is_quiet = not say(line)

    def on_train_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Leave the finished bar standing."""
        self.stop(state)

    def on_exception(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Give the terminal back before the traceback is shown."""
        self.stop(state)

    def time_left(self, state: TrainState) -> str:
        """Return the minutes and seconds to the end, at the pace since training began or was resumed."""
        steps = max(1, state.global_step - self.first_step)
        seconds = (state.max_steps - state.global_step) * (time.monotonic() - self.began) / steps
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"

    def draw_in_time(self, state: TrainState) -> None:
        """Redraw the bar where the last picture is old enough; drawing takes a millisecond."""
        if self.live and time.monotonic() - self.drawn > 1 / self.PER_SECOND:
            with self.shown():
                self.draw(state)

    def draw(self, state: TrainState) -> None:
        """Redraw the bar."""
        self.drawn = time.monotonic()
        text = f"{self.loss}  lr {state.learning_rate:.2e}  {self.rate}"
        self.bar.update(self.task, completed=state.global_step, description=text)
        self.bar.refresh()

    def start(self, args: FitArguments, state: TrainState) -> None:
        """Begin the live display."""
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        class Terminal(Console):
            def on_broken_pipe(self) -> None:
                raise  # the error that rich has caught: its own method would end the process

        self.bar = Bar(
            TextColumn(f"{escape(args.run_name)} update" if args.run_name else "update"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            auto_refresh=False,
            console=Terminal(),
        )
        self.bar.start()
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def stop(self, state: TrainState) -> None:
        """End the live display, once."""
        if self.live and self.bar is not None:
            with self.shown():
                self.draw(state)
                self.bar.stop()
            self.bar, self.live = None, False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Entered around drawing; where that fails, the display ends for the rest of the run."""
        try:
            yield
        except FAILURES as error:
            self.is_quiet, self.live = True, False
            bar, self.bar = self.bar, None
            if bar is not None:
                with suppress(
                    Exception
                ):  # it puts back sys.stdout and sys.stderr, which it had replaced, before it fails
                    bar.stop()
            give_up(sys.stdout, error)


HIDDEN = ("step", "epoch")  # the line begins with these, or the bar shows them
