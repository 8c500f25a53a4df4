"""The strategy ``"fsdp1"``: fully sharded data parallel by flat shards."""

from typing import TYPE_CHECKING, Any

from ...precision.names import import_public

if TYPE_CHECKING:
    from .strategy import FSDP1, FSDP1Options

__all__ = ["FSDP1", "FSDP1Options"]

FILES = {"FSDP1": "strategy", "FSDP1Options": "strategy"}


def __getattr__(name: str) -> Any:
    """Import the class of that name from its file."""
    value = globals()[name] = import_public(__name__, FILES, name)
    return value


def __dir__() -> list[str]:
    """List the exported names, imported or not."""
    return sorted({*globals(), *__all__})
