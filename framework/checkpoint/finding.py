"""Which checkpoint a run resumes from: the newest whole one, or the one that was asked for."""

import sys
from functools import partial
from pathlib import Path

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from .directory import CheckpointError, published, tidy, verify
from .remote import download


def find(strategy: Strategy, output_dir: Path, wanted: bool | str | Path | None) -> Path | None:
    """A checkpoint that agrees with its manifest. Ranks share the reading. Collective.

    Args:
        strategy: set up.
        output_dir: where checkpoints are, oldest to newest.
        wanted: True takes the newest whole one and says which newer ones it passed over; a path takes that one, and
            a URL too, which is first copied into ``output_dir``; None and False take none.

    Returns:
        None where none is wanted, or True and there is no checkpoint at all.

    Raises:
        CheckpointError: the one asked for is damaged, or all there are.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        if strategy.is_main:
            tidy(output_dir)
        candidates = strategy.broadcast(published(output_dir))
    elif isinstance(wanted, str) and "://" in wanted:
        url = wanted

        def fetch() -> Path | None:
            return download(url, output_dir) if strategy.is_main else None

        candidates = [path for path in on_all_ranks(strategy, fetch, CheckpointError) if path is not None]
    else:
        candidates = [Path(wanted)]
    damages = []
    for path in reversed(candidates):
        try:
            on_all_ranks(strategy, partial(verify, path, strategy.rank, strategy.world_size), CheckpointError)
        except CheckpointError as error:
            if wanted is not True:
                raise
            damages.append(str(error))
            if strategy.is_main:
                print(f"Passed over a checkpoint: {error}", file=sys.stderr)
        else:
            return path
    if damages:
        raise CheckpointError(
            f"No checkpoint in {output_dir} is whole. {' '.join(damages)} To begin anew, remove them."
        )
    return None
