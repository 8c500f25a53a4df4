"""FSDP2 as a played rank has it: torch cuts each parameter into as many chunks as there are ranks, and takes two."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param

from ...precision.base import Precision
from ..played import PlayedRank, exchanged


class PlayedFSDP2(PlayedRank):
    """Cuts the chunks that are taken. Thousands of fake tensors for each parameter would take a minute."""

    cuts: AbstractContextManager[None] = nullcontext()

    def set_up(self, precision: Precision) -> None:
        """Set up, and have torch cut as is done here."""
        super().set_up(precision)
        self.cuts = exchanged(_fsdp_param, _chunk_with_empty=Chunks)
        self.cuts.__enter__()

    def tear_down(self) -> None:
        """Have torch cut by itself again."""
        self.cuts.__exit__(None, None, None)
        super().tear_down()


class Chunks(Sequence[Tensor]):
    """What ``torch.chunk`` gives, and an empty tensor for each rank that it leaves without; each made when taken.

    Args:
        tensor: to be cut.
        num_chunks: ranks.
        dim: along which it is cut.
    """

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self.tensor, self.number, self.dim = tensor, num_chunks, dim
        self.size = -(-tensor.size(dim) // num_chunks)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> Any:
        """A chunk.

        Raises:
            IndexError: there are fewer.
        """
        if not 0 <= index < self.number:
            raise IndexError(index)
        begin, whole = index * self.size, self.tensor.size(self.dim)
        if index and begin >= whole:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, begin, min(self.size, whole - begin))
