"""The strategy ``"fsdp2"``: fully sharded data parallel, alone or with tensor and context parallelism."""

from typing import TYPE_CHECKING, Any

from ...precision.names import import_public

if TYPE_CHECKING:
    from .strategy import FSDP2, FSDP2Options

__all__ = ["FSDP2", "FSDP2Options"]

FILES = {"FSDP2": "strategy", "FSDP2Options": "strategy"}


def __getattr__(name: str) -> Any:
    """Import the class of that name from its file."""
    value = globals()[name] = import_public(__name__, FILES, name)
    return value


def __dir__() -> list[str]:
    """List the exported names, imported or not."""
    return sorted({*globals(), *__all__})
