"""The ground that every strategy with several ranks stands on: process group, mesh, collectives."""

import atexit
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ..precision.base import Precision
from ..precision.quantized import scales
from .base import Strategy

# Mesh dimensions, outermost first. Neighbours in the last one are neighbours in rank, on one node's fast links.
REPLICATE, SHARD, CONTEXT, TENSOR = "replicate", "shard", "context", "tensor"


@dataclass(frozen=True)
class ProcessGroupOptions:
    """Options of every strategy with several ranks.

    Args:
        timeout: seconds that a collective waits for the other ranks before it fails.
    """

    timeout: float = 1800.0


class ProcessGroupStrategy(Strategy):
    """Joins the ranks that torchrun (or ``Fit(devices=n)``) started; alone, it is a group of one.

    Subclasses say how the ranks are arranged (``mesh_shape``) and how the module is placed.
    """

    Options = ProcessGroupOptions
    options: Any
    needs_ranks = True

    def set_up(self, precision: Precision) -> None:
        """Join the process group, make the mesh and find this rank's place in it."""
        join(self.options.timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = self.choose_device()
        shape = self.mesh_shape(self.world_size)
        self.mesh = mesh_for(dist.group.WORLD, self.device.type, tuple(shape.items()))
        self.tensor_parallel_size = shape[TENSOR]
        self.context_parallel_size = shape[CONTEXT]
        self.data_size = shape[REPLICATE] * shape[SHARD]
        self.data_rank = self.rank // (shape[CONTEXT] * shape[TENSOR])
        self.gradient_ranks = self.data_size * shape[CONTEXT]
        self.gradient_group = self.mesh[REPLICATE, SHARD, CONTEXT]._flatten("gradient").get_group()
        super().set_up(precision)

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Sizes of the mesh's dimensions, whose product is ``world_size``.

        Raises:
            ValueError: this world can't be cut that way; the message names the sizes that work.
        """
        return {REPLICATE: world_size, SHARD: 1, CONTEXT: 1, TENSOR: 1}

    def choose_device(self) -> torch.device:
        """The accelerator of this rank's number on its node, else the CPU."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
        return device

    def sum_over_data_ranks(self, tensor: Tensor) -> Tensor:
        """All-reduce over the ranks with different samples or positions."""
        if self.gradient_ranks > 1:
            dist.all_reduce(tensor, group=self.gradient_group)
        return tensor

    def max_over_ranks(self, tensor: Tensor) -> None:
        """All-reduce (MAX) over the world."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def sum_on_host(self, values: list[int]) -> list[int]:
        """All-reduce over the world, by gloo."""
        summed = torch.tensor(values)
        dist.all_reduce(summed)
        return summed.tolist()

    def new_group(self) -> Any:
        """All ranks once more, over gloo."""
        return dist.new_group(backend="gloo")

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Every rank's value on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def full_state(self, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, gathered one at a time."""
        for name, tensor in self.model_state().items():
            if name in leave_out:
                continue
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield name, whole.detach().cpu()

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients, gathered one at a time."""
        for name, parameter in self.named_parameters().items():
            if (gradient := parameter.grad) is not None:
                yield name, (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).cpu()

    def tear_down(self) -> None:
        """Leave the process group."""
        leave()


def join(timeout: float) -> None:
    """Make this process a rank: of the world that torchrun describes in the environment, or of a world of one.

    Args:
        timeout: seconds for every collective.
    """
    if dist.is_initialized():
        return
    limit = timedelta(seconds=timeout)
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # Both: tensors go over NCCL on GPUs, host objects over gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives a restart; without a prefix of its own, a new attempt would meet the
            # addresses of the dead ranks.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, world_size, is_master=False, timeout=limit)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            prefixed = dist.PrefixStore(f"attempt{attempt}", store)
            dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=limit)
        else:
            dist.init_process_group(backend, timeout=limit)
    else:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    atexit.register(leave)


@cache
def mesh_for(world: dist.ProcessGroup | None, device_type: str, shape: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """The mesh of that shape, one in the world's life: each dimension is a process group with threads and connections
    of its own, which a second Fit in the same process needn't make again.

    Args:
        world: the group of all ranks, which tells one life from the next.
        device_type: of the ranks' devices.
        shape: the dimensions' names and sizes, outermost first.
    """
    names, sizes = zip(*shape, strict=True)
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def leave() -> None:
    """Destroy the process group."""
    if dist.is_initialized():
        mesh_for.cache_clear()
        dist.destroy_process_group()
        # gloo's threads end a little later; an interpreter that ends before them aborts (pytorch #190489).
        time.sleep(0.2)


def move_module(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)`` for what has memory; late layers get theirs when they are filled."""
    apply: Callable[..., nn.Module] = module._apply  # what nn.Module.to itself is made of
    apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank, one at a time, so that all begin from one model. Those without
    memory yet are left out.
    """
    if dist.get_world_size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            dist.broadcast(tensor, src=0)
    broadcast_scales(module)


@torch.no_grad()
def broadcast_scales(module: nn.Module) -> None:
    """Rank 0's scales of quantized parameters on every rank: they are no buffers."""
    for tensor in scales(module):
        dist.broadcast(tensor, src=0)


def split_world(world_size: int, strategy: str, **degrees: int) -> int:
    """How often the given degrees fit into the world.

    Raises:
        ValueError: they don't; the message names the world sizes and degrees that work.
    """
    product = 1
    for name, degree in degrees.items():
        if degree < 1:
            raise ValueError(f"{strategy}({name}={degree}): a degree counts ranks and must be at least 1.")
        product *= degree
    if world_size % product:
        asked = " x ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1)
        works = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"{strategy} can't cut {world_size} ranks by {asked} (a product of {product}). The product must divide the "
            f"number of ranks: with {world_size} ranks it may be {', '.join(map(str, works))}; with these degrees, "
            f"start {product}, {2 * product} or another multiple of {product} ranks."
        )
    return world_size // product


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh a parameter is spread over; None for a plain tensor."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
