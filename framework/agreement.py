"""Ranks that stay together: the same run on all of them, and what fails on one fails on all."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..strategies.base import Strategy

Result = TypeVar("Result")


def check_ranks_agree(strategy: Strategy, description: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every rank's description of its run with rank 0's. Collective; fails on every rank or on none.

    The ranks exchange a digest each, and the descriptions only where these differ.

    Args:
        strategy: set up.
        description: part of the run ("argument", "parameter") to field to value; small host values.

    Raises:
        ValueError: names the ranks and fields that differ.
    """
    said = repr({part: sorted(fields.items()) for part, fields in description.items()})
    digests = strategy.gather(hashlib.sha256(said.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
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


def on_all_ranks(
    strategy: Strategy, action: Callable[[], Result], error: type[Exception], group: Any = None
) -> list[Result]:
    """Do something on every rank; where one fails, all raise, so that none waits for another. Collective.

    Args:
        strategy: exchanges the outcomes.
        action: this rank's part.
        error: class to raise.
        group: the ranks' group to use, in another thread than training's.

    Returns:
        Every rank's result.

    Raises:
        error: names the first rank that failed, and why.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as caught:
        failure = caught
    # Not its repr, which leaves out the file that an OSError is about.
    said = None if failure is None else str(failure) if isinstance(failure, error) else describe(failure)
    outcomes = strategy.gather((result, said), group)
    failed = {rank: why for rank, (_, why) in enumerate(outcomes) if why is not None}
    if failed:
        where = "" if len(outcomes) == 1 else f"rank {min(failed)}: "
        raise error(where + failed[min(failed)]) from failure
    return [outcome for outcome, _ in outcomes]


def describe(error: BaseException) -> str:
    """An error in one line, as the end of a traceback gives it."""
    return f"{type(error).__name__}: {error}"
