"""FSDP2 as a played rank has it: torch cuts each parameter into as many chunks as there are ranks, and takes two."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param

from ...precision.base import Precision
from ...precision.quantized import quantized_parameters
from ..base import ConfigureOptimizer, Prepare, nothing_to_prepare
from ..played import PlayedRank, exchanged


class PlayedFSDP2(PlayedRank):
    """Cuts the chunks that are taken. Thousands of fake tensors for each parameter would take a minute."""

    exchanges: ExitStack

    def set_up(self, precision: Precision) -> None:
        """Set up, and have torch cut as is done here."""
        super().set_up(precision)
        self.exchanges = ExitStack()
        self.exchanges.enter_context(exchanged(_fsdp_param, _chunk_with_empty=Chunks))

    def tear_down(self) -> None:
        """Have torch cut by itself again."""
        self.exchanges.close()
        super().tear_down()

    def place(
        self, module: nn.Module, configure_optimizer: ConfigureOptimizer | None, prepare: Prepare = nothing_to_prepare
    ) -> None:
        """Place the module. bitsandbytes gives gathered weights their class again, which fake ones can't be of."""
        if quantized_parameters(module):
            from bitsandbytes.nn import modules

            self.exchanges.enter_context(exchanged(modules, fix_4bit_weight_quant_state_from_module=say_how_packed))
        super().place(module, configure_optimizer, prepare)

    def make_zero_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give shards gradients of zeros; what stopped an update has left parameters gathered."""
        for layer in self.module.modules():
            if isinstance(layer, FSDPModule):
                layer.set_reshard_after_forward(True, recurse=False)  # else what is in its forward stays gathered
                layer.reshard()
        super().make_zero_gradients(parameters)


def say_how_packed(layer: nn.Module) -> None:
    """Have a layer's gathered weight know how it is packed."""
    vars(layer.weight)["quant_state"] = layer.quant_state


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
