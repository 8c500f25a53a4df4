"""The strategy ``"xla"``: torch_xla's SPMD, for TPUs."""

from typing import TYPE_CHECKING, Any

from ...precision.names import import_public

if TYPE_CHECKING:
    from .strategy import XLASPMD, XLASPMDOptions

__all__ = ["XLASPMD", "XLASPMDOptions"]

FILES = {"XLASPMD": "strategy", "XLASPMDOptions": "strategy"}


def __getattr__(name: str) -> Any:
    """Import the class of that name from its file."""
    value = globals()[name] = import_public(__name__, FILES, name)
    return value


def __dir__() -> list[str]:
    """List the exported names, imported or not."""
    return sorted({*globals(), *__all__})
