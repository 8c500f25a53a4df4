"""FSDP1 as a played rank has it: torch tells by addresses whether two tensors share memory, and fake ones have none."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.distributed.fsdp import _flat_param

from ...precision.base import Precision
from ..played import PlayedRank, exchanged


class PlayedFSDP1(PlayedRank):
    """Tells by the storages."""

    tells: AbstractContextManager[None] = nullcontext()

    def set_up(self, precision: Precision) -> None:
        """Set up, and have torch ask here."""
        super().set_up(precision)
        self.tells = exchanged(_flat_param, _same_storage=share_storage, _data_ptr_allocated=has_storage)
        self.tells.__enter__()

    def tear_down(self) -> None:
        """Have torch ask itself again."""
        self.tells.__exit__(None, None, None)
        super().tear_down()


def share_storage(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor's storage isn't empty."""
    return tensor.untyped_storage().nbytes() > 0
