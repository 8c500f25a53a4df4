"""One rank of a world that isn't there, played in one process: its tensors have shapes and no memory, and nothing is
sent. ``stratagem plan`` counts what it would hold and send.
"""

from .rank import PlayedRank, play, world_of
from .stage import Stage

__all__ = ["PlayedRank", "Stage", "play", "world_of"]
