"""Export of the plain weights of a module in one file, for use anywhere else."""

import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor

from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from ..printing import say
from .directory import PARTIAL, CheckpointError
from .finite import check_finite
from .frozen import in_parts, leave_out, left_out
from .streaming import check_is_storable, form_of, write_file


def export(strategy: Strategy, path: Path, *, only_trainable: bool = False) -> None:
    """Write whole parameters and buffers by name as safetensors, and tied ones once. Collective; rank 0 writes, and
    holds one whole tensor at a time. The file is there once it is whole, and on the disk. Parts that ``frozen`` was
    called with are left out, unless it was told otherwise.

    Args:
        strategy: it holds the placed module.
        path: the file, by custom with the ending .safetensors; its folder is made.
        only_trainable: leave frozen parameters out.

    Raises:
        ValueError: the module has quantized parameters, and ``only_trainable`` doesn't leave them out.
        CheckpointError: on every rank, where trained weights aren't finite, or the file can't be written.
    """
    absent = names_to_leave_out(strategy, only_trainable)
    weights = weights_to_write(strategy, absent)
    unexported = in_parts(strategy, weights, lambda part: not part.exported)
    weights, absent = leave_out(weights, unexported), absent | unexported
    if unexported and strategy.is_main:
        some = f"{len(unexported)} tensors of frozen parts, such as {min(unexported)!r}"
        say(f"{path} is without {some}; frozen(..., exported=True) has them written.", sys.stderr)
    # Dtypes of most bytes come first, as safetensors has them: each tensor is aligned then.
    sizes = sorted({tensor.itemsize for tensor in weights.values()}, reverse=True)
    passes = [{name for name, tensor in weights.items() if tensor.itemsize == size} for size in sizes]
    for name, tensor in weights.items():
        check_is_storable(name, tensor)
    forms = {name: form_of(weights[name]) for names in passes for name in weights if name in names}

    def whole() -> Iterator[Tensor]:
        for names in passes:
            for name, tensor in strategy.full_state(absent | (forms.keys() - names)):
                if name in names:  # what belongs to a name that is left out has none of its own there
                    yield tensor

    def write() -> None:
        tensors, partial = whole(), path.with_name(path.name + PARTIAL)
        try:
            if strategy.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(partial, forms, {"format": "pt"}, tensors)
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            for _ in tensors:  # the ranks gather each tensor together, whether or not it can be written
                pass

    on_all_ranks(strategy, write, CheckpointError)


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
    names = names_to_leave_out(strategy, only_trainable, adapters=adapters)
    weights_to_write(strategy, names)
    weights = {}
    for name, tensor in strategy.full_state(names):
        if strategy.is_main:
            weights[name] = tensor
    return leave_out(weights, names)


def names_to_leave_out(strategy: Strategy, only_trainable: bool, *, adapters: bool = False) -> set[str]:
    """Return the names of what isn't written; arguments and errors are those of ``whole_weights``."""
    names = left_out(strategy, only_trainable)
    if names and not (only_trainable or adapters):
        raise ValueError(
            f"The quantized parameters of {type(strategy.module).__name__} (such as {min(names)!r}) can't be written "
            "as plain weights. Write what was trained alone: set save_only_trainable=True."
        )
    return names | strategy.tied_names().keys()


def weights_to_write(strategy: Strategy, names: Collection[str]) -> dict[str, Tensor]:
    """Return the weights as they are placed, but for those names, once it is known that they are finite. Collective."""
    strategy.settle()
    weights = leave_out(strategy.model_state(), names)
    check_finite(strategy, weights, {})
    return weights
