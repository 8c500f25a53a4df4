"""The command ``stratagem parity``: a module under several strategies, and how far they come apart."""

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...precision.registry import ALIASES as PRECISION_ALIASES
from ...precision.registry import PRECISIONS
from ...strategies.registry import STRATEGIES
from ..parity import comparing, ranks
from ..parity.recording import Recipe
from ..printing import console_for_tables


def add_parity(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem parity``."""
    known = ", ".join([*STRATEGIES, *ranks.COMBINATIONS])
    parser = commands.add_parser(
        "parity",
        help="train a module a few updates under several strategies and show how far they come apart",
        description=(
            "Train your module a few updates under each strategy, from one seed checkpoint and on the same global "
            "batches, and show the largest relative differences to the first strategy: of the loss over all updates, "
            "of the gradients and of their norm in the first update; and, where one exceeds the tolerance, the first "
            "parameter that diverges, sought from the loss backwards. Dropout is switched off: ranks draw masks of "
            "their own. Where this machine has fewer accelerators than ranks, all of it runs on the CPU. The exit "
            "status is 1 where a strategy fails or exceeds its tolerance."
        ),
        epilog=(
            "The file holds two functions that can be called without arguments: the one you name returns a "
            "TrainModule, and parity_data() (else data(), which stratagem fit takes, or the one that --data names) "
            "returns a small Dataset, the same at every call. They are called in every rank. "
            "Example: stratagem parity examples/gpt.py:build --strategies single,ddp,fsdp2 --ranks 2"
        ),
    )
    defaults = Recipe("")
    parser.add_argument("module", help="path/to/file.py:function or package.module:function; returns a TrainModule")
    parser.add_argument(
        "--strategies",
        default="single,ddp,fsdp2",
        help=f"comma-separated, the first is the reference: {known} (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=positive(int),
        default=2,
        help="for strategies that use several; fsdp2xtp and fsdp2xcp take twice as many (default: %(default)s)",
    )
    parser.add_argument("--updates", type=positive(int), default=defaults.updates, help="(default: %(default)s)")
    parser.add_argument(
        "--precision",
        default=defaults.precision,
        choices=[*PRECISIONS, *PRECISION_ALIASES],
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=positive(float),
        help=(
            f"relative difference that is allowed (default: {comparing.TOLERANCE:g}, and "
            f"{comparing.REORDERED_TOLERANCE:g} for strategies that cut layers; more in 16-bit formats)"
        ),
    )
    parser.add_argument(
        "--data",
        default=defaults.data,
        help="function in the same file that returns a Dataset (default: parity_data, or data)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive(int),
        default=defaults.batch_size,
        help="samples of an update, shared by the data-parallel ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate", type=positive(float), default=defaults.learning_rate, help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(default: %(default)s)")
    parser.add_argument(
        "--timeout", type=positive(float), default=1800.0, help="seconds for each strategy (default: %(default)s)"
    )
    parser.set_defaults(run=run_parity, parser=parser)


def run_parity(options: argparse.Namespace) -> int:
    """Run ``stratagem parity``: print the table, and the errors of strategies that failed.

    Returns:
        0 where every strategy ran within its tolerance, else 1.
    """
    try:
        cases = [ranks.Case.named(name.strip(), options.ranks) for name in options.strategies.split(",")]
    except ValueError as error:
        options.parser.error(str(error))
    recipe = Recipe(
        options.module,
        options.data,
        options.precision,
        options.updates,
        options.batch_size,
        options.learning_rate,
        options.seed,
    )
    with Console(stderr=True).status("") as status:
        rows = ranks.compare_strategies(
            recipe,
            cases,
            options.tolerance,
            options.timeout,
            lambda case: status.update(f"training under {case.name} on {case.ranks} rank(s)"),
        )
    # A file or a pipe has no width, and rows are easier to read unbroken.
    console_for_tables().print(parity_table(recipe, rows))
    for row in rows:
        if row.failure is not None:
            print(f"\n{row.case.name} failed:\n{row.failure.report.strip()}", file=sys.stderr)
    return 0 if len(rows) == len(cases) and all(row.is_right for row in rows) else 1


def parity_table(recipe: Recipe, rows: Sequence[ranks.Row]) -> Table:
    """Make the table of the rows, with their titles and marks."""
    table = Table(
        # Cells are Text, since rich takes ":model:" in a string for an emoji, and "[...]" for a style.
        title=Text(f"{recipe.module}: {recipe.updates} updates of {recipe.batch_size} samples in {recipe.precision}"),
        caption="Largest relative differences to the first row: loss of all updates, gradients of the first one.",
    )
    for heading in ("strategy", "ranks", "loss", "gradient", "tolerance", "first to diverge"):
        is_text = heading in ("strategy", "first to diverge")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        cells = [row.case.name, str(row.case.ranks)]
        if row.failure is not None:
            cells += ["failed", "", "", escape(row.failure.error)]
        elif row.difference is None:
            cells += ["reference"]
        else:
            found = row.difference
            cells += [f"{found.loss:.1e}", f"{found.gradient:.1e}", f"{found.tolerance:.0e}", escape(found.diverges_at)]
        table.add_row(*cells, style="" if row.is_right else "red")
    return table


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Make a function that reads a number above 0 from the command line, as the ``type`` of argparse."""

    def read(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"  # the message of argparse shows this name
    return read
