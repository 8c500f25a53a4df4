"""A module's plain weights in one file, for use anywhere else."""

from pathlib import Path

from safetensors.torch import save_file

from ...strategies.base import Strategy


def export(strategy: Strategy, path: Path) -> None:
    """Write whole parameters and buffers by name as safetensors; tied ones once. Collective; rank 0 holds the weights.

    Args:
        strategy: holds the placed module.
        path: ends in .safetensors by custom; its folder is made.
    """
    aliases = strategy.tied_names()
    tensors = {}
    for name, tensor in strategy.full_state():
        if strategy.is_main and name not in aliases:
            tensors[name] = tensor.contiguous()
    if strategy.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
    strategy.barrier()
