"""The names of checkpoints: given with a save, kept in state.json, spared by rotation, and found again.

A checkpoint with a name has its place, ``checkpoint-<update>``, like any other: it is of a run's line, can be the one
that a run goes on from, and is set aside with the others when another run takes the directory over, name and all.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .directory import DAMAGED, SET_ASIDE, CheckpointError, published
from .line import Line, origin_of

RENAMED = re.compile(rf"checkpoint-(\d+)({re.escape(SET_ASIDE)}|{re.escape(DAMAGED)})")
POSSIBLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> None:
    """Refuse what can't be the name of a checkpoint.

    Raises:
        ValueError: says what can.
    """
    if not isinstance(name, str) or not POSSIBLE.fullmatch(name) or name.startswith("checkpoint-"):
        raise ValueError(
            f"save_checkpoint(name={name!r}): a name is made of at most 100 letters, digits, '.', '_' and '-', begins "
            "with a letter or digit, and not with 'checkpoint-': name='before-surgery'."
        )


def names_at(output_dir: Path, line: Line, update: int) -> tuple[str, ...]:
    """Return the names of a line's checkpoint of an update; none where there is no such checkpoint."""
    origin = origin_of(output_dir / f"checkpoint-{update}")
    return origin.names if origin is not None and origin.is_of(line) else ()


def check_is_free(
    name: str, output_dir: Path, line: Line, update: int, given: Mapping[int, Sequence[str]] | None = None
) -> None:
    """Refuse a name that a line's checkpoint of another update has.

    Args:
        name: to be given.
        output_dir, line: where, and whose.
        update: of the checkpoint that is to have the name; it may have it already.
        given: names that were given to checkpoints which may still be on their way.

    Raises:
        CheckpointError: names the checkpoint.
    """
    taken = {other for other, names in (given or {}).items() if name in names}
    origins = (origin_of(path) for path in published(output_dir))
    taken |= {origin.update for origin in origins if origin is not None and name in origin.names and origin.is_of(line)}
    for other in sorted(taken - {update}):
        raise CheckpointError(
            f"save_checkpoint(name={name!r}): checkpoint-{other} of this run has that name. Write another, e.g. "
            f"name='{name}-{update}'."
        )


def without_names(checkpoints: Iterable[Path]) -> list[Path]:
    """Return the checkpoints that have no name."""
    return [path for path in checkpoints if not ((origin := origin_of(path)) and origin.names)]


def renamed_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints in a directory that were set aside, or renamed as damaged, oldest first."""
    found = output_dir.glob("checkpoint-*") if output_dir.is_dir() else ()
    matched = [(RENAMED.match(path.name), path) for path in found if path.is_dir()]
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in matched if match)]


def find_place(wanted: str | Path, output_dir: Path) -> Path:
    """Return the path of a checkpoint that was asked for: the path itself, or that of the checkpoint with that name.

    A checkpoint that has its place comes before one that was set aside, and of several of them the latest update.

    Raises:
        CheckpointError: there is nothing of that path, and no checkpoint of that name; the message lists the names that
            there are.
    """
    path = Path(wanted).expanduser()
    if not isinstance(wanted, str) or not POSSIBLE.fullmatch(wanted) or path.exists():
        return path
    names: list[str] = []
    for candidate in (*reversed(published(output_dir)), *reversed(renamed_checkpoints(output_dir))):
        origin = origin_of(candidate)
        if origin is not None:
            names += origin.names
            if wanted in origin.names:
                return candidate
    there = f"The names there are {', '.join(dict.fromkeys(names))}" if names else "None there has a name"
    raise CheckpointError(
        f"resume_from_checkpoint={wanted!r}: there is no such path, and no checkpoint of that name in {output_dir}. "
        f"{there}."
    )
