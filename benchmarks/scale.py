"""What grows with the work, and how near it is to the limit: a row for each thing that grows.

    python benchmarks/scale.py                 every row
    python benchmarks/scale.py saving order    these two

A row is a file in ``scale_rows``, with a function for each contestant: stratagem, the same work by hand, which is the
limit, and peers where they are installed. A contestant runs alone in a fresh process, and a round runs each of them
once, so that what else the machine does falls on all alike. Shown are medians over the rounds; "of limit" is the median
of the ratios within a round of the row's first figure.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROWS = Path(__file__).parent / "scale_rows"
FIGURES = "figures: "  # begins the line on which a contestant's process says them


def main() -> None:
    """Run the rows that were asked for, and print a Markdown table of each."""
    names = sorted(path.stem for path in ROWS.glob("*.py") if path.stem not in ("measuring", "states"))
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"of {', '.join(names)}; all of them where none is named"
    )
    parser.add_argument("--rounds", type=int, help="the row's own number by default")
    parser.add_argument("--only", help="runs this contestant of one row in this process, and prints its figures")
    options = parser.parse_args()
    unknown = [name for name in options.rows if name not in names]
    if unknown:
        parser.error(f"There is no row {unknown[0]!r}. There are {', '.join(names)}.")
    if options.only is not None:
        (name,) = options.rows
        print(FIGURES + json.dumps(row_of(name).CONTESTANTS[options.only]()), flush=True)
        return
    for name in options.rows or names:
        print_row(name, options.rounds)


def row_of(name: str) -> ModuleType:
    """Import a row: ``TITLE``, ``ROUNDS``, ``LIMIT`` (a contestant's name) and ``CONTESTANTS`` (name to function)."""
    return importlib.import_module(f"stratagem.benchmarks.scale_rows.{name}")


def print_row(name: str, rounds: int | None) -> None:
    """Run a row's contestants in turns, and print their figures."""
    row = row_of(name)
    rounds = rounds or row.ROUNDS
    measured: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in row.CONTESTANTS}
    for _ in range(rounds):
        for contestant, figures in measured.items():
            figures.append(run_alone(name, contestant))
    units = list(dict.fromkeys(unit for figures in measured.values() for unit in figures[0]))
    print(f"\n## {row.TITLE}\n\n{rounds} rounds.\n")
    print(f"| | {' | '.join(units)} | of limit |\n|---|{'---|' * (len(units) + 1)}")
    limit = measured[row.LIMIT]
    for contestant, figures in measured.items():
        shown = [f"{statistics.median(f[unit] for f in figures):.4g}" if unit in figures[0] else "" for unit in units]
        of_limit = ""
        if units[0] in figures[0] and all(by_hand[units[0]] for by_hand in limit):
            ratios = [ours[units[0]] / by_hand[units[0]] for ours, by_hand in zip(figures, limit, strict=True)]
            of_limit = f"{statistics.median(ratios):.2f}"
        print(f"| {contestant} | {' | '.join(shown)} | {of_limit} |", flush=True)


def run_alone(name: str, contestant: str) -> dict[str, float]:
    """Run one contestant in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    ran = subprocess.run(
        [sys.executable, __file__, name, "--only", contestant],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith(FIGURES)]
    if ran.returncode or not lines:
        raise RuntimeError(f"{contestant!r} of {name!r} failed:\n{ran.stdout}{ran.stderr}")
    figures: dict[str, float] = json.loads(lines[-1].removeprefix(FIGURES))
    return figures


if __name__ == "__main__":
    main()
