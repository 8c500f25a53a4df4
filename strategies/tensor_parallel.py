"""Tensor parallelism over all ranks: each layer is cut, every rank sees every sample."""

from dataclasses import dataclass, replace

from .fsdp2.strategy import FSDP2, FSDP2Options


@dataclass(frozen=True)
class TensorParallelOptions(FSDP2Options):
    """Options of TensorParallel: those of FSDP2, with ``tensor_parallel=0`` for all ranks.

    Args:
        tensor_parallel: ranks that hold each layer together; 0 takes all of them. Where fewer, the rest shard.
    """

    tensor_parallel: int = 0


class TensorParallel(FSDP2):
    """``strategy="tp"``: layers cut by the module's ``tensor_parallel_plan()`` (Shoeybi et al., 2019).

    It is FSDP2 whose data dimension has (by default) one rank: the same path at degree 1.

    Example:
        ``Fit(module, data, strategy="tp", devices=2)``
    """

    name = "tp"
    Options = TensorParallelOptions
    placement = "tp"

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Put all ranks into one tensor-parallel group, unless the options say otherwise."""
        if self.options.tensor_parallel == 0:
            if world_size == 1:
                raise ValueError(
                    "strategy='tp' cuts layers over ranks, and there is one rank. Start more (devices=2, or torchrun "
                    "--nproc-per-node=2), or use strategy='single'."
                )
            self.options = replace(self.options, tensor_parallel=world_size)
        return super().mesh_shape(world_size)
