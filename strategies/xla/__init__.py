"""The strategy ``"xla"``: torch_xla's SPMD, for TPUs."""

from typing import TYPE_CHECKING

from ...precision.names import lazy_exports

if TYPE_CHECKING:
    from .strategy import XLASPMD, XLASPMDOptions

__all__ = ["XLASPMD", "XLASPMDOptions"]

FILES = {"XLASPMD": "strategy", "XLASPMDOptions": "strategy"}

__getattr__, __dir__ = lazy_exports(__name__, FILES)
