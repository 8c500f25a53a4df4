"""Finding the checkpoint that a run resumes from: the newest whole one of its line."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from ..printing import say
from .directory import CheckpointError, published
from .line import Marker, origin_of
from .verifying import verify


def check_is_whole(strategy: Strategy, path: Path) -> None:
    """Compare a checkpoint with its manifest. The ranks share the reading. Collective.

    Raises:
        CheckpointError: on every rank; the message names what is missing or altered.
    """
    on_all_ranks(strategy, partial(verify, path, strategy.rank, strategy.world_size), CheckpointError)


def newest_whole(strategy: Strategy, candidates: Sequence[Path], output_dir: Path) -> tuple[Path | None, list[Path]]:
    """Find the last of the candidates that agrees with its manifest, and print which ones were passed over. Collective.

    Args:
        strategy: set up.
        candidates: checkpoints, oldest first; the same on every rank.
        output_dir: where the candidates were looked for, for the error.

    Returns:
        The checkpoint, or None where there are no candidates; and the checkpoints that were passed over.

    Raises:
        CheckpointError: none of the candidates is whole.
    """
    damaged, damages = [], []
    for path in reversed(candidates):
        try:
            check_is_whole(strategy, path)
        except CheckpointError as error:
            damaged.append(path)
            damages.append(str(error))
            if strategy.is_main:
                say(f"Passed over a checkpoint: {error}", sys.stderr)
        else:
            return path, damaged
    if damages:
        raise CheckpointError(
            f"No checkpoint in {output_dir} is whole. {' '.join(damages)} To begin anew, remove them."
        )
    return None, []


def candidates_in(output_dir: Path, marker: Marker | None) -> list[Path]:
    """List the checkpoints that a run may go on from, oldest first: those of the line of the marker, and those whose
    line can't be told, which are damaged. Without a marker, list all.
    """
    found = published(output_dir)
    if marker is None:
        return found
    origins = {path: origin_of(path) for path in found}
    candidates = [path for path, origin in origins.items() if origin is None or origin.is_of(marker.line)]
    if marker.resumed_from is not None and marker.line.ancestors:
        # The run's own checkpoints are newer than the one that it began with; those of its ancestors may be older.
        began, place = marker.line.ancestors[-1][1], Path(marker.resumed_from)
        if place.is_dir():
            older = [path for path in candidates if update_of(path) < began]
            return [*older, place, *candidates[len(older) :]]
    return candidates


def update_of(path: Path) -> int:
    """Return the update in the name of a checkpoint."""
    return int(path.name.rpartition("-")[2])
