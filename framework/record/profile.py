"""The profile of a run in its report: the tables that a profiler has left in ``<output_dir>/profile``."""

from pathlib import Path

from .html import Section, folded, text

FOLDER = "profile"
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
    parts: list[str] = []
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
        parts.append(f"<h3>{text(path.name)}</h3>{body}" if not parts else folded(path.name, body))
    names = [path.name for path in files if path.suffix not in TABLES][:MOST_FILES]
    if names:
        parts.append(f'<p class="note">{text(f"In {FOLDER}/: " + ", ".join(names))}</p>')
    return [Section("Profile", "".join(parts))]
