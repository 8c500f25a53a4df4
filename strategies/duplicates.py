"""What several ranks hold alike: which part of a tensor a rank has, and fingerprints to compare it by."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..precision.complex_numbers import as_real
from .local_parts import local_part

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer dtype for a number of bytes
ENTRIES = 2**20  # so many entries are mixed at a time, to bound the memory
FACTORS = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB  # odd, and without a pattern

Part = tuple[int, ...]
"""A rank's place among those that a tensor is cut over; () where each holds it whole."""


def part_of(tensor: Any, world_size: int) -> Part | None:
    """Which part of a tensor this rank holds: ranks with the same part hold the same numbers. None where no other rank
    holds them.
    """
    from torch.distributed.tensor import DTensor  # runs on one device are spared this import

    if not isinstance(tensor, DTensor):
        return ()
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    sizes = tensor.device_mesh.shape
    cut = [d for d, placement in enumerate(tensor.placements) if sizes[d] > 1 and not placement.is_replicate()]
    if math.prod(sizes[d] for d in cut) == world_size:
        return None
    return tuple(place[d] for d in cut)


def bits(tensor: Tensor) -> Tensor:
    """The numbers of a plain tensor, end to end, with their bits read as integers."""
    flat = as_real(tensor.detach().contiguous()).reshape(-1)
    return flat.view(INTEGERS[flat.element_size()])


@torch.no_grad()
def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """Compute 64 bits for each tensor, from this rank's numbers in it and their order. Waits for the device, once."""
    sums = [fingerprint(local_part(tensor)) for tensor in tensors]
    devices = {total.device for total in sums}
    return torch.stack([total.to("cpu") for total in sums] if len(devices) > 1 else sums).tolist() if sums else []


def fingerprint(tensor: Tensor) -> Tensor:
    """A sum over a plain tensor of a number that each entry's bits and place are mixed to; 0-dim, on its device."""
    numbers = bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, len(numbers), ENTRIES):
        entries = numbers[begin : begin + ENTRIES]
        mixed = entries + FACTORS[0] * torch.arange(begin, begin + len(entries), device=tensor.device)
        for factor in FACTORS[1:]:
            mixed *= factor
            mixed ^= mixed >> 31
        total += mixed.sum()
    return total
