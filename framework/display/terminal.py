"""A terminal: lines that stay, and under them a bar that is redrawn in its place."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .header import Rows
from .numbers import format_epoch
from .screens import LABEL, Lines, Status, line_of

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {"learning rate": "lr"}
NARROWEST = 8  # columns of the bar, below which texts make way for it
WIDEST = 40


class Terminal(Lines):
    """Draws with rich, which has what a program prints meanwhile appear above the bar."""

    is_live = True

    def __init__(self) -> None:
        self.console = unbroken_console()
        self.live: Any = None

    def begin(self, rows: Rows, status: Status) -> None:
        """Show what a run is, and begin the bar."""
        from rich.live import Live

        self.show(rows)
        self.live = Live(self.picture(status), console=self.console, auto_refresh=False, vertical_overflow="crop")
        self.live.start(refresh=True)

    def show(self, rows: Rows) -> None:
        """Show labels, and under each what is said, as wide as the terminal is."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=LABEL)
        table.add_column()
        for label, text in rows:
            table.add_row(Text(label, "bold cyan", no_wrap=True), Text(text, overflow="fold"))
        if rows:
            self.console.print(table)

    def log(self, status: Status, shown: Mapping[str, str], is_training: bool) -> None:
        """Leave the numbers of a log above the bar; what is left of the run is in the bar."""
        from rich.text import Text

        line = line_of(status, {SHORT.get(name, name): shown[name] for name in shown}, is_training, with_left=False)
        self.console.print(Text(line, "" if is_training else "bold"), soft_wrap=True)
        self.draw(status)

    def draw(self, status: Status) -> None:
        """Redraw the bar; that takes a millisecond."""
        if self.live is not None:
            self.live.update(self.picture(status), refresh=True)

    def end(self, rows: Rows, status: Status) -> None:
        """Leave the finished bar standing, and show under it how the run ended."""
        self.draw(status)
        self.close()
        self.show(rows)

    def close(self) -> None:
        """Give the terminal back."""
        live, self.live = self.live, None
        if live is not None:
            live.stop()

    def picture(self, status: Status) -> Any:
        """The bar with as much text beside it as the terminal has columns for."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        before = f"{status.place} {100 * status.fraction:3.0f}%"
        room = self.console.width - len(before) - 1
        after = "  ".join(fitting(status, room - NARROWEST - 2))
        width = max(1, min(WIDEST, room - len(after) - 2))
        bar = ProgressBar(max(1, status.updates), status.update, width, complete_style="cyan", finished_style="green")
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_row(Text(before, no_wrap=True), bar, Text(after, no_wrap=True))
        return table


def fitting(status: Status, room: int) -> list[str]:
    """The texts beside the bar, in order, without those for which there is no room: the least important go first."""
    names = [name for name in ("loss", "grad norm", "learning rate") if name in status.logs]
    numbers = [f"{SHORT.get(name, name)} {status.logs[name]}" for name in names]
    texts = [
        *reversed(status.times),
        *numbers[:1],
        f"epoch {format_epoch(status.epoch)}",
        status.rate,
        status.note,
        *numbers[1:],
    ]
    taken: list[str] = []
    for text in filter(None, texts):
        if len("  ".join([*taken, text])) > room:
            break
        taken.append(text)
    order = [f"epoch {format_epoch(status.epoch)}", *numbers, status.rate, *status.times, status.note]
    return [text for text in order if text in taken]


def unbroken_console() -> "Console":
    """A console that leaves the process alone where its pipe breaks."""
    from rich.console import Console

    class Unbroken(Console):
        def on_broken_pipe(self) -> None:
            raise  # the error that rich has caught: its own method would end the process

    return Unbroken()
