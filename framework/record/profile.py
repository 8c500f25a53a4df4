"""The profile of a run in its report: the tables that a profiler has left in ``<output_dir>/profile``."""

from collections.abc import Mapping
from pathlib import Path

from .formats import duration
from .history import number
from .html import Section, folded, table, text
from .run_file import read_record

FOLDER = "profile"
PHASES = "phases.json"  # {"phases": {"forward": {"seconds": 1.5}, ...}, "updates": [first, last]}
TABLES = (".txt", ".md")  # what is shown as it is; traces and snapshots are named
MOST_BYTES = 40_000  # of all tables together
MOST_FILES = 20


def profile_sections(directory: Path) -> list[Section]:
    """The sections of a report about what a profiler measured; none where it left nothing.

    Args:
        directory: ``output_dir`` of the run.
    """
    folder = directory / FOLDER
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    except OSError:
        return []
    if not files:
        return []
    room = MOST_BYTES
    parts = [phases(folder / PHASES)]
    for path in [each for each in files if each.suffix in TABLES][:MOST_FILES]:
        try:
            with path.open("rb") as file:
                found = file.read(room)
        except OSError:
            continue
        room -= len(found)
        shown = found.decode("utf-8", "replace")
        # A table is longer than a cell may be: it is cut by lines.
        body = "<pre>" + "\n".join(text(line) for line in shown.splitlines()) + "</pre>"
        parts.append(folded(path.name, body))
    names = [path.name for path in files if path.suffix not in TABLES][:MOST_FILES]
    if names:
        parts.append(f'<p class="note">{text(f"In {FOLDER}/: " + ", ".join(names))}</p>')
    return [Section("Profile", "".join(parts))]


def phases(path: Path) -> str:
    """How the time of some updates is shared among their phases, as the profiler's ``phases.json`` says; "" without."""
    found = read_record(path)
    shares = found.get("phases")
    if not isinstance(shares, Mapping):
        return ""
    seconds = {
        str(name): value
        for name, each in shares.items()
        if isinstance(each, Mapping) and (value := number(each.get("seconds"))) is not None and value > 0
    }
    whole = sum(seconds.values())
    if not whole:
        return ""
    rows = [
        [text(name), f'<span class="bar c{place % 8}" style="width:{100 * value / whole:.1f}%"></span>',
         f"{value / whole:.1%}", text(duration(value))]
        for place, (name, value) in enumerate(sorted(seconds.items(), key=lambda each: -each[1]))
    ]  # fmt: skip
    updates = found.get("updates")
    of = f" of updates {updates[0]} to {updates[1]}" if isinstance(updates, list) and len(updates) == 2 else ""
    return f'<p class="note">{text(f"The time{of}, by phase:")}</p>' + table((), rows, numbers=[2, 3])
