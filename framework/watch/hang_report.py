"""The report of a hang: one sentence that says who waits for whom and where, made of what every rank has told."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .whereabouts import Whereabouts

FOLDER = "hang"  # below output_dir
QUIET = 5.0  # seconds without progress before anything is suspected


def sentence(reports: Mapping[int, Whereabouts], hosts: Mapping[int, str]) -> str:
    """Say what a person needs to know first.

    Args:
        reports: of the ranks that answered, by rank.
        hosts: every rank's machine, by rank.
    """
    missing = sorted(hosts.keys() - reports.keys())
    waiting = [report for _, report in sorted(reports.items()) if report.waits]
    busy = [report for _, report in sorted(reports.items()) if not report.waits]
    if len(hosts) == 1 and busy:
        return f"This process has been in {at(busy[0])} for {busy[0].seconds:.0f} s, in update {busy[0].update}."
    if missing:
        said = f"{ranks(missing, hosts)} {verb(missing, 'doesn', 'don')}'t answer: stopped, dead, or cut off"
        return said + waits_for(waiting, missing) + also(busy)
    if waiting and busy:
        said = "; ".join(f"rank {r.rank} (host {r.host}) has been in {at(r)} for {r.seconds:.0f} s" for r in busy)
        return said + waits_for(waiting, [r.rank for r in busy])
    if busy:
        return "No rank waits for another. " + "; ".join(f"rank {r.rank} has been in {at(r)}" for r in busy) + "."
    return different_collectives(waiting)


def different_collectives(waiting: Sequence[Whereabouts]) -> str:
    """Say where the ranks are when all of them wait in collectives."""
    places: dict[str, list[int]] = {}
    for report in waiting:
        places.setdefault(at(report) + in_collective(report), []).append(report.rank)
    numbers = {report.number for report in waiting}
    if len(places) == 1:
        if len(numbers) == 1:
            return (
                f"All ranks wait in {next(iter(places))}, the same collective. The network between their machines may "
                "be at fault."
            )
        least = min(report.number for report in waiting)
        behind = [report.rank for report in waiting if report.number == least]
        return f"All ranks wait in {next(iter(places))}, but {ranks(behind)} {verb(behind, 'is', 'are')} behind."
    said = "; ".join(f"{ranks(which)} in {where}" for where, which in places.items())
    return (
        f"The ranks wait for one another in different collectives: {said}. What one rank calls, all have to call: "
        "save_checkpoint, evaluate, export and predict belong on every rank."
    )


def waits_for(waiting: Sequence[Whereabouts], whom: Sequence[int]) -> str:
    """Say who waits for some ranks, and in what; empty where nobody does."""
    if not waiting:
        return "."
    first = waiting[0]
    which = [report.rank for report in waiting]
    pronoun = "it" if len(whom) == 1 else "them"
    collective = first.collective.partition(" number ")[0] or "collective"
    where = f"the {collective} of {first.phase or 'the run'}" if first.phase else f"the {collective}"
    return f"; {ranks(which)} {verb(which, 'waits', 'wait')} for {pronoun} in {where}, in update {first.update}."


def also(busy: Sequence[Whereabouts]) -> str:
    """Say where those are that neither wait nor are missing."""
    return "".join(f" Rank {r.rank} has been in {at(r)} for {r.seconds:.0f} s." for r in busy)


def at(report: Whereabouts) -> str:
    """Name a rank's place: "your forward, train.py:41"."""
    place = f"{report.place} in {report.function}" if report.place else ""
    return ", ".join(part for part in (report.phase, place) if part) or "Python code outside of the run"


def in_collective(report: Whereabouts) -> str:
    """Name the collective that a rank waits in, in brackets; empty where it isn't known."""
    return f" ({report.collective.partition(' number ')[0]})" if report.collective else ""


def ranks(which: Iterable[int], hosts: Mapping[int, str] | None = None) -> str:
    """Name ranks: "rank 1 (host b)", "ranks 0, 2 to 5"."""
    numbers = sorted(which)
    if len(numbers) == 1:
        host = f" (host {hosts[numbers[0]]})" if hosts else ""
        return f"rank {numbers[0]}{host}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [
        str(run[0]) if len(run) == 1 else f"{run[0]}, {run[1]}" if len(run) == 2 else f"{run[0]} to {run[-1]}"
        for run in runs
    ]
    return "ranks " + ", ".join(parts)


def verb(which: Sequence[int], one: str, several: str) -> str:
    """The verb's form for so many ranks."""
    return one if len(which) == 1 else several


def write_file(output_dir: str | Path, report: Whereabouts, stacks: str) -> Path:
    """Write one rank's report in full, the stacks of its threads among it.

    Returns:
        The file.

    Raises:
        OSError: it can't be written.
    """
    folder = Path(output_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"update-{report.update}-rank-{report.rank}.txt"
    facts = "\n".join(f"{name}: {value}" for name, value in vars(report).items())
    path.write_text(f"{facts}\n\n{stacks}\n", encoding="utf-8")
    return path
