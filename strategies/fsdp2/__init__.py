"""The strategy ``"fsdp2"``: fully sharded data parallel, alone or with tensor and context parallelism."""

from typing import TYPE_CHECKING

from ...precision.names import lazy_exports

if TYPE_CHECKING:
    from .strategy import FSDP2, FSDP2Options

__all__ = ["FSDP2", "FSDP2Options"]

FILES = {"FSDP2": "strategy", "FSDP2Options": "strategy"}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
