"""Placement on devices: ``Fit(strategy=...)`` takes a name, or an instance of a class here.

Each class is imported from its file when it is first asked for, so that a name costs no import of the others.
"""

from typing import TYPE_CHECKING

from ..precision.names import files_of, lazy_exports
from .base import Strategy
from .registry import STRATEGIES, get_strategy, register_strategy

if TYPE_CHECKING:
    from .auto import Auto
    from .ddp.strategy import DDP
    from .deepspeed.strategy import DeepSpeed
    from .dp import DP
    from .fsdp1.strategy import FSDP1
    from .fsdp2.strategy import FSDP2
    from .process_group import ProcessGroupOptions, ProcessGroupStrategy
    from .single import Single
    from .tensor_parallel import TensorParallel
    from .xla.strategy import XLASPMD

__all__ = [
    "DDP",
    "DP",
    "FSDP1",
    "FSDP2",
    "STRATEGIES",
    "XLASPMD",
    "Auto",
    "DeepSpeed",
    "ProcessGroupOptions",
    "ProcessGroupStrategy",
    "Single",
    "Strategy",
    "TensorParallel",
    "get_strategy",
    "register_strategy",
]

FILES = {
    **files_of(STRATEGIES),
    "ProcessGroupOptions": "process_group",
    "ProcessGroupStrategy": "process_group",
}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
