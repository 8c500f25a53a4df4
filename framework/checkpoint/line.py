"""The line of a run: its id and the runs that it goes on from, which tell its checkpoints from those of other runs.

A run that is resumed from its newest checkpoint keeps its id. A run that begins anew has a new id and no ancestors. A
run that goes on from an older checkpoint, or from one of another directory, has a new id, and its ancestors are the run
of that checkpoint, up to the update of the checkpoint, and the ancestors of that run. Each checkpoint has the line of
its run in its state.json. The run that works in a directory leaves its line in ``line.json`` there: the marker.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .directory import (
    MANIFEST,
    CheckpointError,
    flush,
    hash_file,
    published,
    read_json,
    replace_text,
)

STATE = "state.json"
MARKER = "line.json"
EARLIER_MARKER = "run.json"  # where earlier versions wrote it; now a run's record (record/run_file.py), which keeps it
RECORD_FORMAT = "record_format"  # the entry that a record has, and a marker hasn't
BEFORE_IDS = ""  # the id of every run of a version that gave no ids


@dataclass(frozen=True)
class Line:
    """A run and the runs that it descends from.

    Attributes:
        id: 16 hexadecimal digits; "" for a run that was saved before runs had ids.
        ancestors: (id, the last update that belongs to the line) of each run that it descends from, the nearest last.
    """

    id: str
    ancestors: tuple[tuple[str, int], ...] = ()

    @classmethod
    def begin(cls) -> "Line":
        """Make the line of a new run. The id comes from the system, so that two runs of one seed have different ids."""
        return cls(secrets.token_hex(8))

    def branch(self, update: int) -> "Line":
        """Make the line of a new run that goes on from a checkpoint of this one."""
        return Line(Line.begin().id, (*self.ancestors, (self.id, update)))

    def holds(self, run: str, update: int) -> bool:
        """Return whether the checkpoint that a run saved at an update belongs to this line."""
        return run == self.id or any(run == name and update <= until for name, until in self.ancestors)

    def to_dict(self) -> dict[str, Any]:
        """Return the line as JSON types."""
        return {"id": self.id, "ancestors": [{"id": name, "until": until} for name, until in self.ancestors]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Line":
        """Make the line that ``to_dict`` returned."""
        return cls(str(saved["id"]), tuple((str(each["id"]), int(each["until"])) for each in saved["ancestors"]))


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from.

    Attributes:
        line: the line of the run that saved it.
        update: the update that it was saved after.
        names: that it was given, beside its place.
    """

    line: Line
    update: int
    names: tuple[str, ...] = ()

    def is_of(self, line: Line) -> bool:
        """Return whether the checkpoint belongs to a line."""
        return line.holds(self.line.id, self.update)


def origin_of(checkpoint: Path) -> Origin | None:
    """Return where a checkpoint comes from, or None where its state.json isn't what its manifest says."""
    try:
        files = [(checkpoint / name).stat() for name in (MANIFEST, STATE)]
    except OSError:
        return None
    return _origin_of(checkpoint, tuple((file.st_ino, file.st_mtime_ns, file.st_size) for file in files))


@lru_cache(maxsize=1024)  # rotation asks for the same checkpoints after each save
def _origin_of(checkpoint: Path, stamps: tuple[tuple[int, ...], ...]) -> Origin | None:
    try:
        if hash_file(checkpoint / STATE) != read_json(checkpoint / MANIFEST)["files"][STATE]:
            return None
        state = read_json(checkpoint / STATE)
        line = Line.from_dict(state["run"]) if "run" in state else Line(BEFORE_IDS)
        return Origin(line, int(state["progress"]["global_step"]), tuple(str(name) for name in state.get("names", ())))
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def checkpoints_of(line: Line, output_dir: Path) -> list[Path]:
    """List the checkpoints in a directory that are known to belong to a line, oldest first."""
    return [path for path in published(output_dir) if (origin := origin_of(path)) and origin.is_of(line)]


@dataclass(frozen=True)
class Launch:
    """A run as its launcher knows it, which may start it again.

    Attributes:
        name: the same in each attempt, and of this run alone; "" where nobody starts it again.
        is_restart: whether the launcher has started it again, by what any of its ranks knows.
        most: ranks that it begins with, where it was asked to go on with fewer; else 0.
        was_here: whether an earlier attempt has left its marker in the directory of the run.
        keeps_samples: whether an update has ``global_batch`` samples, whatever the arguments come to on these ranks.
        may_come_again: whether the launcher will start it again where it fails now.
        global_batch: samples in an update, as the first attempt had them; 0 where that isn't known.
    """

    name: str = ""
    is_restart: bool = False
    most: int = 0
    was_here: bool = False
    keeps_samples: bool = False
    may_come_again: bool = False
    global_batch: int = 0


@dataclass(frozen=True)
class Marker:
    """What a run writes into its directory to say that the directory is its own.

    Attributes:
        line: the line of the run.
        resumed_from: the checkpoint that the run began with, where it isn't in the directory under a checkpoint's name.
        launch: the name of the run among those of its launcher, which may start it again; "" where there is none.
        global_batch: samples in an update of the run; 0 where that isn't known.
    """

    line: Line
    resumed_from: str | None = None
    launch: str = ""
    global_batch: int = 0


def read_marker(output_dir: Path) -> Marker | None:
    """Read the marker of the last run that saved into a directory, or was about to.

    Raises:
        CheckpointError: the marker can't be read.
    """
    path = output_dir / MARKER
    if not path.exists():
        path = output_dir / EARLIER_MARKER
        if not path.exists():
            return None
    saved = read_json(path)
    if isinstance(saved, dict) and RECORD_FORMAT in saved and "ancestors" not in saved:
        return None
    try:
        came_from = saved.get("resumed_from")
        launch, global_batch = str(saved.get("launch", "")), int(saved.get("global_batch", 0))
        return Marker(Line.from_dict(saved), None if came_from is None else str(came_from), launch, global_batch)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was altered: it must hold the id and the ancestors of the run whose checkpoints are to be gone on "
            "from. Pass the path of a checkpoint, or remove it to have the highest number taken."
        ) from error


def of_first_attempt(launch: Launch, output_dir: Path) -> Launch:
    """Return the run as its launcher knows it, with what its first attempt has left in its directory."""
    try:
        marker = read_marker(output_dir)
    except CheckpointError:  # it is for those to raise who resume from there
        return launch
    if marker is None or marker.launch != launch.name:
        return launch
    return replace(launch, was_here=True, keeps_samples=True, global_batch=marker.global_batch)


def of_checkpoint(launch: Launch, checkpoint: Path | None) -> Launch:
    """Return the run as its launcher knows it, with the samples in an update of the checkpoint that its first attempt
    begins with, where a range of ranks was asked for and those that saved were another number than the most of it.
    """
    if checkpoint is None or launch.was_here or not launch.most:
        return launch
    from .schema import read_state  # its library is imported by runs that resume

    state = read_state(checkpoint)
    if state["world_size"] == launch.most:
        return launch
    samples = state["data"]["global_micro_batch"] * state["arguments"]["gradient_accumulation_steps"]
    return replace(launch, keeps_samples=True, global_batch=samples)


def write_marker(output_dir: Path, marker: Marker) -> None:
    """Write a marker in one step. It is on the disk when this returns."""
    saved = {**marker.line.to_dict(), "resumed_from": marker.resumed_from}
    if marker.launch:
        saved |= {"launch": marker.launch, "global_batch": marker.global_batch}
    replace_text(output_dir / MARKER, json.dumps(saved) + "\n")
    flush(output_dir)


def checkpoints_of_last_run(output_dir: Path) -> list[Path]:
    """List the checkpoints in a directory that belong to the line of the last run that saved there, oldest first."""
    marker = read_marker(output_dir)
    return checkpoints_of(marker.line, output_dir) if marker is not None else published(output_dir)
