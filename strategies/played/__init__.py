"""One rank of a world that isn't there, played in one process: its tensors have shapes and no memory, and nothing is
sent. ``stratagem plan`` counts what it would hold and send.
"""

from .cuts import cuts_of
from .exchanged import exchanged
from .here import Here, look_here, told_by_first
from .rank import PlayedRank, play, world_of
from .stage import Stage

__all__ = ["Here", "PlayedRank", "Stage", "cuts_of", "exchanged", "look_here", "play", "told_by_first", "world_of"]
