"""The strategy ``"fsdp1"``: fully sharded data parallel by flat shards."""

from typing import TYPE_CHECKING

from ...precision.names import lazy_exports

if TYPE_CHECKING:
    from .strategy import FSDP1, FSDP1Options

__all__ = ["FSDP1", "FSDP1Options"]

FILES = {"FSDP1": "strategy", "FSDP1Options": "strategy"}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
