"""Strategy names to classes. A new strategy is one new file and one line here."""

from collections.abc import Mapping
from typing import Any

from ..precision.names import resolve
from .base import Strategy

# name -> "file:Class"; the class receives the name's own options.
STRATEGIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "single": ("single:Single", {}),
    "auto": ("auto:Auto", {}),
    "ddp": ("ddp.strategy:DDP", {}),
    "fsdp1": ("fsdp1.strategy:FSDP1", {}),
    "fsdp2": ("fsdp2.strategy:FSDP2", {}),
    "tp": ("tensor_parallel:TensorParallel", {}),
    "dp": ("dp:DP", {}),
    "deepspeed": ("deepspeed.strategy:DeepSpeed", {}),
    **{f"deepspeed_stage_{stage}": ("deepspeed.strategy:DeepSpeed", {"stage": stage}) for stage in range(4)},
    "xla": ("xla.strategy:XLASPMD", {}),
}
ALIASES: Mapping[str, str] = {"fsdp": "fsdp2"}


def get_strategy(choice: "str | Strategy") -> Strategy:
    """The strategy for a name ("ddp", "fsdp2", ...) or an instance, which is returned as it is."""
    return resolve("strategy", choice, Strategy, STRATEGIES, ALIASES, __package__ or "")
