"""A choice among candidates as a person reads it: a row for each, and the words of the one that is chosen."""

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .choosing import ORDER, Choice, Figures, Verdict
from .shown import number, size

HEADINGS = "peak", "on host", "between nodes", "in a node"
STATIC = (
    "No update of this module could be played with tensors that have no memory, so that activations and messages "
    "aren't known: parameters, gradients, optimizer state and buffers decide, and then simplicity."
)
OFFLOADED = (
    "Where the host's memory holds shards, copies of them on their way aren't counted, nor the time of an optimizer "
    "that steps on the host."
)


def choice_shown(choice: Choice, title: str) -> Group:
    """Make what is printed of a choice.

    Args:
        choice: among candidates.
        title: what was planned.
    """
    rows = [cells_of(each.figures) for each in choice.verdicts]
    told = [heading for heading in HEADINGS if any(row[heading] for row in rows)]
    table = Table()
    table.add_column("candidate", overflow="fold")
    for heading in told:
        table.add_column(heading, justify="right")
    table.add_column("")
    table.add_column("", justify="right")
    for verdict, cells in zip(choice.verdicts, rows, strict=True):
        candidate = verdict.figures.candidate
        style = "bold" if candidate == choice.chosen else ("" if verdict.fits else "dim")
        shown = (cells[heading] for heading in told)
        table.add_row(candidate.title, *shown, verdict.sentence, number_of(verdict), style=style)
    return Group(Text(title, style="bold"), table, *(Text(f"\n{line}") for line in sentences(choice)))


def cells_of(figures: Figures) -> dict[str, str]:
    """Write the figures of a candidate by their headings; "" for what it has nothing of."""
    columns = (figures.need, figures.on_host, figures.between_nodes, figures.in_node)
    cells = {heading: size(each) if each else "" for heading, each in zip(HEADINGS, columns, strict=True)}
    if figures.is_bound:
        cells["peak"] = f"at most {cells['peak']}"
    return cells


def number_of(verdict: Verdict) -> str:
    """Write the number that a verdict's sentence is about."""
    if verdict.number is None:
        return ""
    if verdict.unit == "s":
        return f"{verdict.number:.3g} s"
    return f"{number(verdict.number)}FLOPs" if verdict.unit == "FLOPs" else size(verdict.number)


def sentences(choice: Choice) -> Iterable[str]:
    """Say what is chosen, in words that a user would write, and by what."""
    chosen = choice.chosen
    room = f"{size(choice.room)} of the device"
    if choice.host_room is not None:
        room += f" and {size(choice.host_room)} of the host's memory"
    if chosen is None:
        yield (
            f"Nothing fits into {room} for each rank. Take more ranks, a smaller per_device_train_batch_size with more "
            "gradient_accumulation_steps, or another precision."
        )
    else:
        yield f"Chosen, for {room} for each rank: {' '.join(chosen.words)}"
        yield f"In Python: Fit(..., {chosen.python})"
    yield ORDER
    if any(each.unit == "s" for each in choice.verdicts):
        yield "What was measured comes before all others, the fastest first."
    if choice.is_static:
        yield STATIC
    if any(each.figures.candidate.offloads and each.figures.on_host for each in choice.verdicts):
        yield OFFLOADED
