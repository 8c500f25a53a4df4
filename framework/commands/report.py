"""``stratagem report``: writes the report of a run from what its directory holds, or of several beside one another."""

import argparse
import sys
from pathlib import Path

from ..printing import say
from ..record.comparison import write_comparison
from ..record.finding import Run, runs_in
from ..record.report import write_report

COMPARISON = "comparison.html"


def add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem report``."""
    parser = commands.add_parser(
        "report",
        help="write a page with a run's curves, or one that compares several runs",
        description=(
            "Write a page of HTML about a run, from its log.jsonl and, where it is there, its run.json: curves, "
            "configuration, checkpoints, sessions. Of several runs: their curves over one another, the arguments in "
            "which they differ, and their last numbers. The page needs no network. Its path is printed."
        ),
        epilog="Example: stratagem report output/first output/second --output both.html",
    )
    parser.add_argument(
        "directories", metavar="DIRECTORY", nargs="+", type=Path, help="a run's output_dir, or a folder with runs in it"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help=f"the page (default: report.html in the run's directory; of several, {COMPARISON} here)",
    )  # fmt: skip
    parser.set_defaults(run=run_report, parser=parser)


def run_report(options: argparse.Namespace) -> int:
    """Run ``stratagem report``.

    Returns:
        0 where the page was written, else 1.
    """
    runs = [run for directory in options.directories for run in runs_in(directory)]
    runs = list({run.directory.resolve(): run for run in runs}.values())
    if not runs:
        options.parser.error(f"there is no run in {', '.join(map(str, options.directories))}: no log.jsonl or run.json")
    for run in runs:
        run.read()
    try:
        path = written(runs, options.output)
    except OSError as error:
        print(f"The report can't be written: {error}", file=sys.stderr)
        return 1
    say(str(path))
    return 0


def written(runs: list[Run], output: Path | None) -> Path:
    """Write the page; return its path."""
    if len(runs) == 1:
        (run,) = runs
        return write_report(run.directory, run.record, run.history, output)
    return write_comparison(runs, output or Path(COMPARISON))
