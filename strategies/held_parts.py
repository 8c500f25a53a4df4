"""Which parts of a whole tensor a rank's shard is made of: worked out from the mesh and the placements alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Ranges = list[tuple[int, int]]  # (begin, end) along one dimension, in the order in which they lie in the shard
Slices = tuple[slice, ...]  # one for each dimension


@dataclass(frozen=True)
class HeldPart:
    """A box of a whole tensor that a rank holds in one piece.

    Attributes:
        whole: where it lies in the whole tensor.
        local: where it lies in the rank's shard.
    """

    whole: Slices
    local: Slices


def held_parts(tensor: Tensor) -> list[HeldPart]:
    """The parts of a tensor that this rank holds: one that is everything where the tensor is a plain one. A shard that
    is empty has one part, which is empty, too.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return parts_of(shape, (), (), ())
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "every rank is in every mesh"
    return parts_of(shape, tuple(tensor.device_mesh.shape), tuple(place), tensor.placements)


def parts_of(
    shape: Sequence[int], mesh_shape: Sequence[int], place: Sequence[int], placements: Sequence[Any]
) -> list[HeldPart]:
    """The parts of a tensor of that shape which the rank at a place of a mesh holds.

    A dimension may be cut by several dimensions of the mesh, and in another order than the mesh's: tensor parallelism
    cuts rows first and FSDP cuts what is left of them, though it comes first in the mesh. torch calls that strided.

    Args:
        shape: of the whole tensor.
        mesh_shape: ranks in each dimension of the mesh.
        place: of the rank in each.
        placements: torch's, one for each dimension of the mesh.
    """
    held: list[Ranges] = [[(0, size)] for size in shape]
    for size, index, placement in zip(mesh_shape, place, placements, strict=True):
        dimension = getattr(placement, "dim", None)
        if dimension is None:
            if not placement.is_replicate():
                raise ValueError(f"A parameter is placed as {placement}, which says of no rank what values it holds.")
            continue
        pieces = chunks(held[dimension], getattr(placement, "split_factor", 1))
        held[dimension] = [piece for part in pieces for piece in chunk(part, size, index)]
    held = [ranges or [(0, 0)] for ranges in held]
    local = [list(lengths(ranges)) for ranges in held]
    return [
        HeldPart(tuple(slice(*r) for r in whole), tuple(slice(*r) for r in here))
        for whole, here in zip(product(*held), product(*local), strict=True)
    ]


def chunks(ranges: Ranges, number: int) -> list[Ranges]:
    """Cut what ranges cover, end to end, into a number of chunks as ``torch.chunk`` would; the last may be empty."""
    return [chunk(ranges, number, index) for index in range(number)]


def chunk(ranges: Ranges, number: int, index: int) -> Ranges:
    """One of those chunks."""
    total = sum(end - begin for begin, end in ranges)
    size = -(-total // number)
    return cut(ranges, min(index * size, total), min((index + 1) * size, total))


def cut(ranges: Ranges, first: int, last: int) -> Ranges:
    """The ranges that cover the entries from ``first`` to before ``last`` of what ranges cover, end to end."""
    found: Ranges = []
    passed = 0
    for begin, end in ranges:
        low, high = max(begin, begin + first - passed), min(end, begin + last - passed)
        if low < high:
            if found and found[-1][1] == low:
                found[-1] = found[-1][0], high
            else:
                found.append((low, high))
        passed += end - begin
    return found


def lengths(ranges: Ranges) -> Iterator[tuple[int, int]]:
    """Where each range lies when they are laid end to end."""
    begin = 0
    for first, last in ranges:
        yield begin, begin + last - first
        begin += last - first


def local_shape(parts: Sequence[HeldPart]) -> tuple[int, ...]:
    """The shape of the shard that is made of these parts."""
    return tuple(max(piece.stop for piece in pieces) for pieces in zip(*(part.local for part in parts), strict=True))


@torch.no_grad()
def cut_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Cut this rank's shard out of a whole tensor, which every rank holds. No rank sends anything.

    Args:
        whole: of the parameter's shape.
        parameter: a plain tensor or a DTensor, which may be without memory.
    """
    whole = whole.detach()
    if not isinstance(parameter, DTensor):
        return whole
    parts = held_parts(parameter)
    local = whole.new_empty(local_shape(parts))
    for part in parts:
        local[part.local] = whole[part.whole]
    return local


def from_local(local: Tensor, parameter: DTensor) -> Tensor:
    """Make a DTensor of this rank's shard that is placed as ``parameter`` is.

    Args:
        local: of the shape that ``local_shape`` gives.
        parameter: may be without memory; its own shards may be of a class of their own, which says how they are
            gathered.
    """
    placed = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    if type(parameter.to_local()) is Tensor:
        return placed
    return torch.empty_like(parameter, device=local.device).copy_(placed)
