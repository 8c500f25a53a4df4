"""What all ranks must have in common, compared before anything is trained."""

from collections.abc import Mapping
from typing import Any

from ..strategies.base import Strategy


def check_ranks_agree(strategy: Strategy, description: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every rank's description of its run with rank 0's. Collective; fails on every rank or on none.

    Args:
        strategy: set up.
        description: part of the run ("argument", "parameter") to field to value; small host values.

    Raises:
        ValueError: names the ranks and fields that differ.
    """
    everyones = strategy.gather(description)
    differences = [
        f"rank {rank}: {part} {field} is {mine.get(field, 'absent')!r}, on rank 0 {theirs.get(field, 'absent')!r}"
        for rank, other in enumerate(everyones)
        for part in description
        for mine, theirs in [(other[part], everyones[0][part])]
        for field in sorted({*mine, *theirs})
        if mine.get(field, "absent") != theirs.get(field, "absent")
    ]
    if differences:
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise ValueError("The ranks were given different runs:\n  " + "\n  ".join(differences[:10]) + more)
