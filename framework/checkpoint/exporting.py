"""Export of the plain weights of a module in one file, for use anywhere else."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...strategies.base import Strategy
from .finite import check_finite
from .frozen import leave_out, left_out


def export(strategy: Strategy, path: Path, *, only_trainable: bool = False) -> None:
    """Write whole parameters and buffers by name as safetensors, and tied ones once. Collective; rank 0 writes.

    Args:
        strategy: it holds the placed module.
        path: the file, by custom with the ending .safetensors; its folder is made.
        only_trainable: leave frozen parameters out.
    """
    tensors = {name: tensor.contiguous() for name, tensor in whole_weights(strategy, only_trainable).items()}
    if strategy.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
    strategy.barrier()


def whole_weights(strategy: Strategy, only_trainable: bool, *, adapters: bool = False) -> dict[str, Tensor]:
    """Gather whole parameters and buffers by name on the host of rank 0, and tied ones once. Collective.

    Args:
        strategy: it holds the placed module.
        only_trainable: leave frozen parameters out.
        adapters: leave quantized parameters out, as those under adapters.

    Returns:
        The tensors on rank 0, and nothing on other ranks.

    Raises:
        ValueError: the module has quantized parameters, and neither option leaves them out.
        CheckpointError: on every rank, where trained weights aren't finite.
    """
    names = left_out(strategy, only_trainable)
    if names and not (only_trainable or adapters):
        raise ValueError(
            f"The quantized parameters of {type(strategy.module).__name__} (such as {min(names)!r}) can't be written "
            "as plain weights. Write what was trained alone: set save_only_trainable=True."
        )
    names |= strategy.tied_names().keys()
    strategy.settle_buffers()
    check_finite(strategy, leave_out(strategy.model_state(), names), {})
    weights = {}
    for name, tensor in strategy.full_state(names):
        if strategy.is_main:
            weights[name] = tensor
    return leave_out(weights, names)
