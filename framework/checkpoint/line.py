"""A run's own line: its id and the runs that it goes on from, which tell its checkpoints from those of other runs.

A run that is resumed from its newest checkpoint keeps its id. One that begins anew has a new id and no ancestors; one
that goes back, or goes on from a checkpoint of elsewhere, has a new id and, as its ancestors, the run of that
checkpoint up to there, and that run's ancestors. Each checkpoint has the line of its run in its state.json, and the run
that works in a directory leaves its own in ``run.json`` there: the marker.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .directory import MANIFEST, PARTIAL, CheckpointError, flush, hash_file, published, read_json, write_text

STATE = "state.json"
MARKER = "run.json"
BEFORE_IDS = ""  # the id of every run of a version that gave none


@dataclass(frozen=True)
class Line:
    """A run and those it descends from.

    Attributes:
        id: of the run, 16 hexadecimal digits; "" of one that was saved before runs had ids.
        ancestors: (id, the last update that belongs to the line) of each run it descends from, the nearest last.
    """

    id: str
    ancestors: tuple[tuple[str, int], ...] = ()

    @classmethod
    def begin(cls) -> "Line":
        """A new run's. Its id comes from the system: two runs of one seed have different ones."""
        return cls(secrets.token_hex(8))

    def branch(self, update: int) -> "Line":
        """Of a new run that goes on from this one's checkpoint of an update."""
        return Line(Line.begin().id, (*self.ancestors, (self.id, update)))

    def holds(self, run: str, update: int) -> bool:
        """Whether a run's checkpoint of an update belongs to this line."""
        return run == self.id or any(run == name and update <= until for name, until in self.ancestors)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"id": self.id, "ancestors": [{"id": name, "until": until} for name, until in self.ancestors]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Line":
        """What ``to_dict`` gave."""
        return cls(str(saved["id"]), tuple((str(each["id"]), int(each["until"])) for each in saved["ancestors"]))


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from.

    Attributes:
        line: of the run that saved it.
        update: that it was saved after.
    """

    line: Line
    update: int

    def is_of(self, line: Line) -> bool:
        """Whether it belongs to a line."""
        return line.holds(self.line.id, self.update)


def origin_of(checkpoint: Path) -> Origin | None:
    """Where a checkpoint comes from; None where its state.json isn't there as its manifest says: it may be anyone's."""
    try:
        files = [(checkpoint / name).stat() for name in (MANIFEST, STATE)]
    except OSError:
        return None
    return _origin_of(checkpoint, tuple((file.st_ino, file.st_mtime_ns, file.st_size) for file in files))


@lru_cache(maxsize=1024)  # rotation asks for the same ones after each save
def _origin_of(checkpoint: Path, stamps: tuple[tuple[int, ...], ...]) -> Origin | None:
    try:
        if hash_file(checkpoint / STATE) != read_json(checkpoint / MANIFEST)["files"][STATE]:
            return None
        state = read_json(checkpoint / STATE)
        line = Line.from_dict(state["run"]) if "run" in state else Line(BEFORE_IDS)
        return Origin(line, int(state["progress"]["global_step"]))
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def checkpoints_of(line: Line, output_dir: Path) -> list[Path]:
    """The checkpoints in a directory that are known to belong to a line, oldest first."""
    return [path for path in published(output_dir) if (origin := origin_of(path)) and origin.is_of(line)]


@dataclass(frozen=True)
class Marker:
    """What a run leaves in its directory.

    Attributes:
        line: of the run.
        resumed_from: the checkpoint that it began with, where that one has no name of a checkpoint in the directory.
    """

    line: Line
    resumed_from: str | None = None


def read_marker(output_dir: Path) -> Marker | None:
    """The marker of the last run that saved into a directory, or was about to.

    Raises:
        CheckpointError: it can't be read.
    """
    path = output_dir / MARKER
    if not path.exists():
        return None
    saved = read_json(path)
    try:
        came_from = saved.get("resumed_from")
        return Marker(Line.from_dict(saved), None if came_from is None else str(came_from))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was altered: it must hold the id and the ancestors of the run whose checkpoints are to be gone on "
            "from. Pass the path of a checkpoint, or remove it to have the highest number taken."
        ) from error


def write_marker(output_dir: Path, marker: Marker) -> None:
    """Leave a marker, in one step, on the disk when this returns."""
    path = output_dir / MARKER
    partial = path.with_name(path.name + PARTIAL)
    write_text(partial, json.dumps({**marker.line.to_dict(), "resumed_from": marker.resumed_from}) + "\n")
    os.replace(partial, path)
    flush(output_dir)


def checkpoints_of_last_run(output_dir: Path) -> list[Path]:
    """The checkpoints in a directory that belong to the line of the last run that saved there, oldest first."""
    marker = read_marker(output_dir)
    return checkpoints_of(marker.line, output_dir) if marker is not None else published(output_dir)
