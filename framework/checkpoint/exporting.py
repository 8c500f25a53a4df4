"""A module's plain weights in one file, for use anywhere else."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...strategies.base import Strategy
from .frozen import left_out, without


def export(strategy: Strategy, path: Path, *, only_trainable: bool = False) -> None:
    """Write whole parameters and buffers by name as safetensors; tied ones once. Collective; rank 0 holds the weights.

    Args:
        strategy: holds the placed module.
        path: ends in .safetensors by custom; its folder is made.
        only_trainable: leave frozen parameters out.
    """
    tensors = {name: tensor.contiguous() for name, tensor in whole_weights(strategy, only_trainable).items()}
    if strategy.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
    strategy.barrier()


def whole_weights(strategy: Strategy, only_trainable: bool, *, adapters: bool = False) -> dict[str, Tensor]:
    """Whole parameters and buffers by name on the host of rank 0, tied ones once; nothing on others. Collective.

    Args:
        strategy: holds the placed module.
        only_trainable: leave frozen parameters out.
        adapters: of a module whose quantized weights aren't wanted.

    Raises:
        ValueError: quantized weights are wanted.
    """
    names = left_out(strategy, only_trainable)
    if names and not (only_trainable or adapters):
        raise ValueError(
            f"The quantized parameters of {type(strategy.module).__name__} (such as {min(names)!r}) can't be written "
            "as plain weights. Write what was trained alone: set save_only_trainable=True."
        )
    names |= strategy.tied_names().keys()
    strategy.settle_buffers()
    weights = {}
    for name, tensor in strategy.full_state(names):
        if strategy.is_main:
            weights[name] = tensor
    return without(weights, names)
