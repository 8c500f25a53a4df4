"""Frozen and quantized weights, which a checkpoint leaves out or shares, and how a resumed run recognizes them.

What is left out a resumed run takes from the module as the user built it. So that adapters are never put over another
base model unnoticed, the checkpoint holds the shape and dtype of each frozen tensor, and a sum over its bits, which is
the same however the tensor is sharded.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...precision.frozen import Frozen, frozen_parts
from ...precision.quantized import quantized_parameters
from ...strategies.base import Strategy
from ...strategies.duplicates import bits
from .directory import CheckpointError
from .tensors import Stored


def left_out(strategy: Strategy, only_trainable: bool) -> set[str]:
    """Return the names of the parameters that a checkpoint leaves out: quantized ones always, since their codes mean
    nothing without the scales, which are neither parameters nor buffers; and frozen ones with ``only_trainable``.
    """
    parameters = strategy.named_parameters(remove_duplicate=False)
    quantized = {id(parameter) for parameter in quantized_parameters(strategy.module).values()}
    return {name for name, p in parameters.items() if id(p) in quantized or (only_trainable and not p.requires_grad)}


def in_parts(strategy: Strategy, names: Iterable[str], chosen: Callable[[Frozen], bool]) -> set[str]:
    """Return those names of tensors that are of parts that ``frozen`` was called with.

    Args:
        strategy: where the module is placed.
        names: of parameters and buffers.
        chosen: whether a part counts. What is inside of another goes by its own mark.
    """
    with strategy.unwrapped():
        parts = frozen_parts(strategy.module)
    if not any(map(chosen, parts.values())):
        return set()

    def part_of(name: str) -> Frozen | None:
        return next((parts[part] for part in (*beginnings(name), "") if part in parts), None)

    return {name for name in names if (part := part_of(name)) is not None and chosen(part)}


def leave_out(tensors: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """Leave out the tensors of these names, and what belongs to them ("up.weight.absmax" belongs to "up.weight")."""
    return {name: tensor for name, tensor in tensors.items() if not any(n in names for n in beginnings(name))}


def beginnings(name: str) -> Iterator[str]:
    """Yield a dotted name, then the name without its last part, and so on."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def fingerprints(strategy: Strategy, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the shape, dtype and sum of bits of each tensor, as JSON types. Collective."""
    sums = strategy.sum_on_host([local_sum(tensor, strategy.is_main) for tensor in tensors.values()])
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sum": value}
        for (name, tensor), value in zip(tensors.items(), sums, strict=True)
    }


def local_sum(tensor: Tensor, is_main: bool) -> int:
    """Return the sum of a tensor's bits, read as integers, modulo 2^64; of a sharded tensor, this rank's share."""
    if isinstance(tensor, DTensor):
        place = tensor.device_mesh.get_coordinate()
        assert place is not None
        if any(p.is_replicate() and at for p, at in zip(tensor.placements, place, strict=True)):
            return 0  # the first replica counts for all of them
        tensor = tensor.to_local()
    elif not is_main:
        return 0
    return int(bits(tensor).sum())


def as_stored(frozen: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    """Return what would be stored of the tensors of these fingerprints."""
    return {
        name: Stored(tuple(entry["shape"]), getattr(torch, entry["dtype"].removeprefix("torch.")))
        for name, entry in frozen.items()
    }


def check_frozen(path: Path, strategy: Strategy, model: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Refuse a module with other frozen weights than the run of the checkpoint had. Values that are kept in a wider
    dtype than they were are rounded to it, and those in a narrower one can't be compared. Collective.

    Raises:
        CheckpointError: the message names the weights that differ.
    """
    current = fingerprints(strategy, {name: rounded(model[name], entry["dtype"]) for name, entry in saved.items()})
    other = [
        name
        for name, entry in saved.items()
        if entry["dtype"] == current[name]["dtype"] and entry["sum"] != current[name]["sum"]
    ]
    if other:
        more = f" and {len(other) - 10} more" if len(other) > 10 else ""
        raise CheckpointError(
            f"{path} holds trained weights without the frozen ones they belong to, and this module's frozen ones have "
            f"other values: {', '.join(other[:10])}{more}. Build it from the same pretrained weights."
        )


def rounded(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor in the floating-point dtype of that name, where that is narrower, else as it is."""
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    narrows = tensor.is_floating_point() and dtype.is_floating_point and dtype.itemsize < tensor.itemsize
    return tensor.to(dtype) if narrows else tensor
