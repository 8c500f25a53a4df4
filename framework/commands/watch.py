"""``stratagem watch``: shows runs while they go on, from what they have written alone."""

import argparse
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..printing import console_for_tables
from ..record.finding import Run, runs_in

LOOK = 5.0  # seconds between two looks for new runs


def add_watch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem watch``."""
    parser = commands.add_parser(
        "watch",
        help="show the progress and the loss of runs in the terminal, while they go on",
        description=(
            "Show a run in the terminal while it goes on: progress, the loss, the last numbers, the time that is left, "
            "and whether it gives signs of life. All is read from its log.jsonl (and its run.json, where it is there), "
            "so that it may run elsewhere, on a file system that both see. Several runs are shown one a row. "
            "End it with Ctrl-C; the runs don't notice."
        ),
    )
    parser.add_argument(
        "directories", metavar="DIRECTORY", nargs="+", type=Path, help="a run's output_dir, or a folder with runs in it"
    )
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    parser.add_argument("--interval", type=seconds, default=1.0, help="seconds between two looks (default: 1)")
    parser.set_defaults(run=run_watch, parser=parser)


def seconds(text: str) -> float:
    """Read a number of seconds from the command line."""
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise ValueError
    return value


def run_watch(options: argparse.Namespace) -> int:
    """Run ``stratagem watch``.

    Returns:
        0; with ``--once``, 1 where there is no run.
    """
    from rich.console import Console

    console = Console() if "COLUMNS" in os.environ else console_for_tables()
    watched = Watched(options.directories)
    if options.once or not console.is_terminal:
        watched.look()
        watched.read()
        console.print(watched.picture(console.width))
        return 0 if watched.runs else 1
    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            watched.look()
            watched.read()
            live.update(watched.picture(console.width), refresh=True)
            time.sleep(options.interval)
    return 0


class Watched:
    """The runs in some directories, those that begin meanwhile included.

    Args:
        directories: of runs, or of folders with runs.
    """

    def __init__(self, directories: list[Path]) -> None:
        self.directories = directories
        self.runs: dict[Path, Run] = {}
        self._looked = float("-inf")

    def look(self) -> None:
        """Look for runs that are new, now and then."""
        now = time.monotonic()
        if now - self._looked < LOOK and self.runs:
            return
        self._looked = now
        for directory in self.directories:
            for run in runs_in(directory):
                self.runs.setdefault(run.directory.resolve(), run)

    def read(self) -> None:
        """Read what they have written."""
        for run in self.runs.values():
            run.read()

    def picture(self, columns: int) -> Any:
        """Show them; rich prints it."""
        from rich.text import Text

        from ..record.live import clean, picture

        if not self.runs:
            names = ", ".join(clean(str(directory)) for directory in self.directories)
            return Text(f"There is no run in {names} yet: no log.jsonl or run.json.", style="yellow")
        return picture(list(self.runs.values()), columns)
