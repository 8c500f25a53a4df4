"""run.json: what a run is and was, in one file that is replaced whole, and holds every session of the run."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.line import RECORD_FORMAT
from ..replacing import replace_file

NAME = "run.json"
FORMAT = 1
MOST_SESSIONS = 200
MOST_EARLIER = 20
LISTS = ("sessions", "checkpoints", "earlier_runs")
MAPPINGS = (
    "arguments", "best", "device", "evaluation", "git", "host", "metrics", "module", "precision", "program", "strategy",
    "versions",
)  # fmt: skip
# What an earlier version wrote into a file of this name, and a run goes on from: see checkpoint/line.py.
OF_EARLIER_MARKERS = ("id", "ancestors", "resumed_from", "launch", "global_batch")


class RunFile:
    """The record of the run that works, or worked last, in a directory.

    Args:
        directory: ``output_dir``.

    Attributes:
        content: what is in the file, or will be.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self.content: dict[str, Any] = {}

    def begin(
        self, run: str, facts: Mapping[str, Any], session: Mapping[str, Any], last_seen: Mapping[str, Any]
    ) -> None:
        """Take in a session that begins. What the file holds of the same run stays, but for what ``facts`` says anew;
        another run is shortened to a line.

        Args:
            run: its id.
            facts: what the run is.
            session: when, where, and at which update it began.
            last_seen: entries of the session before, where that one noted no end.
        """
        found = read_record(self.path)
        before = found if found.get("id_of_run") == run else {}
        earlier = found.get("earlier_runs", [])
        if found and not before and "id_of_run" in found:
            earlier = [*earlier, in_short(found)][-MOST_EARLIER:]
        marker = {name: found[name] for name in OF_EARLIER_MARKERS if name in found}
        changed = changed_arguments(before.get("arguments", {}), facts.get("arguments", {}))
        new = {**session, **({"changed_arguments": changed} if before and changed else {})}
        sessions = before.get("sessions", [])
        if sessions and sessions[-1].get("state") == "running":
            sessions = [*sessions[:-1], {**sessions[-1], **last_seen}]
        self.content = {
            RECORD_FORMAT: FORMAT,
            "id_of_run": run,
            **before,
            **facts,
            "sessions": [*sessions, new][-MOST_SESSIONS:],
            **({"earlier_runs": earlier} if earlier else {}),
            **marker,
        }

    def note(self, **entries: Any) -> None:
        """Set entries of the record."""
        self.content |= entries

    def note_session(self, **entries: Any) -> None:
        """Set entries of the session that is under way."""
        sessions = self.content.get("sessions") or [{}]
        self.content["sessions"] = [*sessions[:-1], {**sessions[-1], **entries}]

    def write(self) -> None:
        """Replace the file. A reader, or a kill, finds the old one or the new one."""
        replace_file(self.path, json.dumps(plain(self.content), indent=1, ensure_ascii=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file; empty where there is none that can be read. Entries of a wrong kind are left out."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    for name in LISTS:
        if not isinstance(found.get(name, []), list):
            del found[name]
    for name in MAPPINGS:
        if not isinstance(found.get(name, {}), dict):
            del found[name]
    found["sessions"] = [each for each in found.get("sessions", []) if isinstance(each, dict)]
    return found


def in_short(record: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a run when another one begins in its directory."""
    sessions = record.get("sessions") or [{}]
    names = ("id_of_run", "run_name", "strategy", "precision", "world_size")
    return {
        **{name: record[name] for name in names if name in record},
        "began": sessions[0].get("began"),
        "ended": sessions[-1].get("ended"),
        "state": sessions[-1].get("state"),
        "last_update": sessions[-1].get("last_update"),
    }


def changed_arguments(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The arguments that were given otherwise than in the session before: [before, now] by name."""
    old, new = before.get("given"), now.get("given")
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return {}
    new = plain(new)
    return {name: [old.get(name), new[name]] for name in new if old.get(name) != new[name]}


def plain(value: Any) -> Any:
    """A value as JSON types: numbers that aren't finite, and whatever JSON doesn't know, as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return str(value)
