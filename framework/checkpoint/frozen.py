"""The weights that a checkpoint leaves out, frozen or quantized ones, and how they are known again on a resume.

They come from the module as the user built it. So that adapters are never laid over another base in silence, the
checkpoint holds each frozen tensor's shape, dtype and a sum over its bits, which is the same however it is sharded.
"""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...precision.quantized import quantized_parameters
from ...strategies.base import Strategy
from ...strategies.duplicates import bits
from .directory import CheckpointError
from .tensors import Stored


def left_out(strategy: Strategy, only_trainable: bool) -> set[str]:
    """Names of the parameters that a checkpoint does without: the frozen ones, or those of them that are quantized:
    their codes are nothing without their scales, which are neither parameters nor buffers.
    """
    parameters = strategy.named_parameters(remove_duplicate=False)
    quantized = {id(parameter) for parameter in quantized_parameters(strategy.module).values()}
    return {name for name, p in parameters.items() if id(p) in quantized or (only_trainable and not p.requires_grad)}


def without(tensors: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """``tensors`` but for those of ``names``, and for those that belong to one ("up.weight.absmax" to "up.weight")."""
    return {name: tensor for name, tensor in tensors.items() if not any(n in names for n in beginnings(name))}


def beginnings(name: str) -> Iterator[str]:
    """A dotted name, and what is left of it as its last parts go."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def fingerprints(strategy: Strategy, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and sum of bits of each tensor, as JSON types. Collective."""
    sums = strategy.sum_on_host([local_sum(tensor, strategy.is_main) for tensor in tensors.values()])
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sum": value}
        for (name, tensor), value in zip(tensors.items(), sums, strict=True)
    }


def local_sum(tensor: Tensor, is_main: bool) -> int:
    """The sum of a tensor's bits, read as integers, modulo 2^64; of a sharded one this rank's share."""
    if isinstance(tensor, DTensor):
        place = tensor.device_mesh.get_coordinate()
        assert place is not None
        if any(p.is_replicate() and at for p, at in zip(tensor.placements, place, strict=True)):
            return 0  # the first of the replicas speaks for them
        tensor = tensor.to_local()
    elif not is_main:
        return 0
    return int(bits(tensor).sum())


def described(frozen: Mapping[str, Mapping[str, Any]]) -> dict[str, Stored]:
    """Fingerprints as if their tensors were stored."""
    return {
        name: Stored(tuple(entry["shape"]), getattr(torch, entry["dtype"].removeprefix("torch.")))
        for name, entry in frozen.items()
    }


def check_frozen(path: Path, strategy: Strategy, model: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Refuse a module whose frozen weights are others than those the checkpoint was trained over. Where another
    precision keeps them in another dtype, their values can't be compared. Collective.

    Raises:
        CheckpointError: names those that differ.
    """
    current = fingerprints(strategy, {name: model[name] for name in saved})
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
