"""The strategy ``"deepspeed"``: ZeRO by the package's own engine."""

from typing import TYPE_CHECKING

from ...precision.names import lazy_exports

if TYPE_CHECKING:
    from .strategy import DeepSpeed, DeepSpeedOptions

__all__ = ["DeepSpeed", "DeepSpeedOptions"]

FILES = {"DeepSpeed": "strategy", "DeepSpeedOptions": "strategy"}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
