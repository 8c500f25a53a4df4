"""A module's plain weights in one file, for use anywhere else."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from ...strategies.base import Strategy
from .contents import tied_names


def export(strategy: Strategy, module: nn.Module, path: Path) -> None:
    """Write whole parameters and buffers by name as safetensors; tied ones once. Collective; rank 0 holds the weights.

    Args:
        strategy: holds the placed module.
        module: the user's.
        path: ends in .safetensors by custom; its folder is made.
    """
    aliases = tied_names(module)
    tensors = {}
    for name, tensor in strategy.full_state():
        if strategy.is_main and name not in aliases:
            tensors[name] = tensor.contiguous()
    if strategy.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
    strategy.barrier()
