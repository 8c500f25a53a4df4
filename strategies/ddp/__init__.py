"""The strategy ``"ddp"``: DistributedDataParallel."""

from typing import TYPE_CHECKING

from ...precision.names import lazy_exports

if TYPE_CHECKING:
    from .strategy import DDP, DDPOptions

__all__ = ["DDP", "DDPOptions"]

FILES = {"DDP": "strategy", "DDPOptions": "strategy"}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
