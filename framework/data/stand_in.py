"""The batch that stands in where a rank has no samples left."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StandIn:
    """A batch for a rank that has no samples left, so that it takes part in the collectives of an update or an
    evaluation. It counts no items, and nothing that is computed from it is kept.

    Args:
        batch: a batch of the usual structure, whatever is in it.
    """

    batch: Any
