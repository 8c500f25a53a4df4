"""FSDP1 as a played rank has it: torch tells by addresses whether two tensors share memory, and fake ones have none."""

from typing import Any

from torch import Tensor
from torch.distributed.fsdp import _flat_param

from ...precision.base import Precision
from ..played import PlayedRank

OWN = {name: getattr(_flat_param, name) for name in ("_same_storage", "_data_ptr_allocated")}


class PlayedFSDP1(PlayedRank):
    """Tells by the storages."""

    def set_up(self, precision: Precision) -> None:
        """Set up, and have torch ask here."""
        super().set_up(precision)
        exchange({"_same_storage": share_storage, "_data_ptr_allocated": has_storage})

    def tear_down(self) -> None:
        """Have torch ask itself again."""
        exchange(OWN)
        super().tear_down()


def exchange(functions: dict[str, Any]) -> None:
    """Put functions in the place of torch's, by name."""
    for name, function in functions.items():
        setattr(_flat_param, name, function)


def share_storage(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor's storage isn't empty."""
    return tensor.untyped_storage().nbytes() > 0
