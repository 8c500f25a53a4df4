"""The ranks and the memory that are here before a strategy is set up, and what rank 0 tells the others then."""

from dataclasses import dataclass
from typing import Any

import torch

from ..environment import find_place
from ..host_memory import memory_of_host
from ..process_group import ProcessGroupStrategy, join

SECONDS = 1800.0  # that ranks wait for the first one


@dataclass(frozen=True)
class Here:
    """This process among the ranks that were started, and what each has.

    Attributes:
        rank, world_size: of this process, and of all.
        ranks_per_node: ranks on this machine.
        host_memory: bytes of the host's memory for each rank; None where the system doesn't say.
        device_memory: bytes of a rank's accelerator; None where there is none.
    """

    rank: int
    world_size: int
    ranks_per_node: int
    host_memory: int | None
    device_memory: int | None


def look_here() -> Here:
    """Find out where this process is, and what it has."""
    place, memory = find_place(), memory_of_host()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device_memory = None
    if accelerator is not None:
        index = place.local_rank % torch.accelerator.device_count()
        device_memory = torch.get_device_module(accelerator).get_device_properties(index).total_memory
    per_node = place.local_world_size
    return Here(place.rank, place.world_size, per_node, None if memory is None else memory // per_node, device_memory)


def told_by_first(here: Here, value: Any) -> Any:
    """Tell rank 0's value to all ranks. Collective; they join their process group for it."""
    if here.world_size == 1:
        return value
    join(SECONDS)
    return ProcessGroupStrategy().broadcast(value)
