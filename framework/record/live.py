"""Runs as pictures in a terminal: progress, the curve of the loss, the last numbers, and whether they are alive."""

import socket
from collections.abc import Sequence

import psutil
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .braille import plot, sparkline
from .curves import Curve
from .finding import Run
from .formats import duration, in_bytes, short, widened, words
from .report import longest_pause

STYLES = {"finished": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "silent": "yellow"}
CURVES = ("cyan", "dark_orange")  # training and evaluation
SILENT = 30.0  # seconds without a line, at least, after which a run that hasn't ended gives no sign of life
GONE = 5.0  # the same, where its process is gone
ROWS = 10


def picture(runs: Sequence[Run], columns: int) -> RenderableType:
    """Show runs: one in full, several in a table and the first few that run in full as far as there is room.

    Args:
        runs: read.
        columns: of the terminal.
    """
    if len(runs) == 1:
        return panel(runs[0], columns)
    return overview(runs, columns)


def panel(run: Run, columns: int) -> Panel:
    """One run in full."""
    history, (state, said) = run.history, state_of(run)
    parts: list[RenderableType] = [progress(run)]
    if history.curves.get("loss") or losses(run):
        parts += [Text(), loss_plot(run, max(20, columns - 18))]
    parts += [Text(), numbers(run)]
    if history.checkpoints:
        saved = [each for each in history.checkpoints.values() if not each.is_removed]
        newest = clean(saved[-1].name) if saved else "none left"
        parts.append(Text(f"checkpoints: {len(saved)}, the newest {newest}", style="dim"))
    if len(history.sessions) > 1:
        parts.append(Text(f"session {len(history.sessions)} of this run", style="dim"))
    if run.log.damaged:
        parts.append(Text(f"{run.log.damaged} lines of the log can't be read", style="dim"))
    if history.sessions and (reason := history.sessions[-1].reason):
        parts += [Text(), Text(clean(reason)[:300], style=STYLES[state])]
    title = Text.assemble((clean(run.name), "bold"), "  ", (said, STYLES[state]))
    place = Text(clean(str(run.directory)), style="dim")
    return Panel(Group(*parts), title=title, title_align="left", subtitle=place, subtitle_align="right", padding=(1, 2))


def state_of(run: Run) -> tuple[str, str]:
    """(state, the same in words) of a run, by its log: one that is killed can't say so."""
    history = run.history
    silent = run.silent_for()
    if not history.sessions and not history.curves:
        return "running", "nothing is logged yet"
    state = history.state
    if state != "running":
        return state, f"{state} {duration(silent)} ago" if silent is not None else state
    if silent is not None:
        if silent > GONE and process_is_gone(run):
            return "failed", f"its process is gone; the last sign of life was {duration(silent)} ago"
        if silent > max(SILENT, 5 * longest_pause(history)):
            return "silent", f"no sign of life for {duration(silent)}"
    return "running", "running"


def process_is_gone(run: Run) -> bool:
    """Whether the process of the last session, where it was on this machine, isn't there any more."""
    last = (run.record.get("sessions") or [{}])[-1]
    process = last.get("process")
    if last.get("host") != socket.gethostname() or not isinstance(process, int) or process <= 1:
        return False
    return not psutil.pid_exists(process)


def progress(run: Run) -> RenderableType:
    """Update, bar, percent, epoch, elapsed and remaining time."""
    history, length = run.history, run.max_steps
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    told = []
    if length:
        told.append(f"{min(1.0, history.step / length):.0%}")
    if history.epoch:
        told.append(f"epoch {history.epoch:.2f}")
    if elapsed := sum(session.seconds for session in history.sessions):
        told.append(duration(elapsed))
    if (left := seconds_left(run)) is not None:
        told.append(f"{duration(left)} left")
    where = f"update {history.step:,}" + (f" / {length:,}" if length else "")
    bar = progress_bar(run, None) if length else Text()
    row.add_row(Text(where, style="bold"), bar, Text(" · ".join(told)))
    return row


def progress_bar(run: Run, width: int | None) -> ProgressBar:
    """The part of the run that is done."""
    length = run.max_steps
    done, color = min(run.history.step, length), STYLES[state_of(run)[0]]
    return ProgressBar(total=length, completed=done, width=width, complete_style=color, finished_style=color)


def seconds_left(run: Run) -> float | None:
    """At the pace of the last logs; None where it isn't known, or the run isn't under way."""
    rate, length = run.history.updates_per_second, run.max_steps
    if not rate or length <= run.history.step or run.history.state != "running":
        return None
    return (length - run.history.step) / rate


def loss_name(run: Run) -> str:
    """The name of the first evaluation loss; "" where there is none."""
    names = (name for name in run.history.curves if name.startswith("eval_") and name.endswith("loss"))
    return next(names, "")


def losses(run: Run) -> Curve | None:
    """The curve of the first evaluation loss."""
    return run.history.curves.get(loss_name(run))


def points_of(curve: Curve | None, most: int) -> list[tuple[float, float]]:
    """The finite points of a curve, thinned out."""
    if curve is None:
        return []
    steps, values = curve.thinned(most)
    return [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]


def loss_plot(run: Run, columns: int) -> RenderableType:
    """The loss in training and in evaluation, with its axes."""
    train, held_out = (points_of(each, 4 * columns) for each in (run.history.curves.get("loss"), losses(run)))
    both = [*train, *held_out]
    if not both:
        return Text("no loss that is finite yet", style="dim")
    low, high = widened(value for _, value in both)
    left, right = widened(step for step, _ in both)
    shown = Text()
    rows = plot([train, held_out], columns, ROWS, (left, right, low, high))
    for number, row in enumerate(rows):
        label = short(high) if number == 0 else short(low) if number == ROWS - 1 else ""
        shown.append(f"{label:>9} ", style="dim")
        shown.append("│" if label == "" else "┤", style="dim")
        for character, owner in row:
            shown.append(character, style=CURVES[owner] if owner >= 0 else "")
        shown.append("\n")
    first, last = short(left), short(right)
    shown.append(" " * 10 + f" {first}{' ' * max(1, columns - len(first) - len(last))}{last}", style="dim")
    shown.append("\n" + " " * 11)
    shown.append("━ train", style=CURVES[0])
    if held_out:
        shown.append(f"   ━ {clean(words(loss_name(run)))}", style=CURVES[1])
    return shown


def numbers(run: Run) -> RenderableType:
    """The last value of what is logged, those that are looked for first at the beginning."""
    last = run.history.last
    hidden = ("updates_per_second", "slowest_rank", "slowest_rank_ratio", "data_wait_seconds")
    order = sorted(last, key=lambda name: (name != "loss", name.startswith("memory_")))
    found = [
        (words(name), in_bytes(last[name]) if name.startswith("memory_") else short(last[name]))
        for name in order
        if name not in hidden
    ]
    if (rate := run.history.updates_per_second) is not None:
        found.append(("updates / s", short(rate)))
    if "slowest_rank_ratio" in last:
        slow = f"{last.get('slowest_rank', 0):.0f} ({last['slowest_rank_ratio']:.2f} times)"
        found.append(("slowest rank", slow))
    if "data_wait_seconds" in last and rate:
        found.append(("waiting for data", f"{min(1.0, last['data_wait_seconds'] * rate):.0%}"))
    each = (Text.assemble((clean(name) + " ", "dim"), (clean(value), "bold")) for name, value in found[:24])
    return Columns(each, padding=(0, 3))


def overview(runs: Sequence[Run], columns: int) -> RenderableType:
    """Several runs, one a row."""
    shown = Table(expand=True, box=None, padding=(0, 1), header_style="dim")
    for heading, is_number in (("run", False), ("state", False), ("update", True), ("", False), ("loss", True),
                               ("", False), ("eval loss", True), ("updates/s", True), ("left", True)):  # fmt: skip
        shown.add_column(heading, justify="right" if is_number else "left", no_wrap=heading not in ("run", "state"))
    room = max(8, min(30, columns // 8))
    for run in runs:
        history, (state, said) = run.history, state_of(run)
        loss, length = history.curves.get("loss"), run.max_steps
        bar = progress_bar(run, room) if length else Text()
        held_out = losses(run)
        shown.add_row(
            Text(clean(run.name), style="bold"),
            Text(said, style=STYLES[state]),
            f"{history.step:,}" + (f" / {length:,}" if length else ""),
            bar,
            short(history.last.get("loss")),
            Text(sparkline(loss.finite, room) if loss else "", style=CURVES[0]),
            short(held_out.last if held_out else None),
            short(history.updates_per_second),
            duration(seconds_left(run)),
        )
    return shown


def clean(said: str) -> str:
    """A text without what would move a terminal's cursor or change its colors."""
    return "".join(character if character.isprintable() else "�" for character in said)
