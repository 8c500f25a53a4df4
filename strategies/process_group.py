"""The ground that every strategy with several ranks stands on: process group, mesh, collectives."""

import atexit
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..precision.base import Precision
from .alike import broadcast_module, move_module
from .base import Strategy
from .batch_norm import separate, synchronize
from .buffers import ChangingBuffers
from .environment import SLURM, Place, find_place
from .meeting import (
    abort_when_told,
    compare_words,
    drop_groups,
    settle_failure,
    store_of_attempt,
    wait_for_all,
    wait_for_failure,
)
from .mesh import (
    CONTEXT,
    REPLICATE,
    SHARD,
    TENSOR,
    forget_groups,
    forget_meshes,
    forget_other_meshes,
    mesh_for,
    whole_of,
)
from .tree import sum_along_tree
from .whole_parameters import average_gradients

STORE_SECONDS = 5.0  # that a rank waits for an answer of the store, outside of what the ranks do together


@dataclass(frozen=True)
class ProcessGroupOptions:
    """Options of every strategy with several ranks.

    Args:
        timeout: seconds that a collective waits for the other ranks before it fails.
        sync_batchnorm: BatchNorm layers compute their statistics over the samples of all ranks, at the price of a
            message in each layer's forward and backward. Without it each rank normalizes by its own samples.
    """

    timeout: float = 1800.0
    sync_batchnorm: bool = False


class ProcessGroupStrategy(Strategy):
    """Joins the ranks that torchrun, srun, mpirun or ``Fit(devices=n)`` started; alone, it is a group of one.

    Subclasses say how the ranks are arranged (``mesh_shape``) and how the module is placed.

    Attributes:
        whole_parameters: what a sharding subclass keeps whole on every rank (strategies/whole_parameters.py).
    """

    Options = ProcessGroupOptions
    options: Any
    needs_ranks = True
    takes_closure = False
    whole_parameters: Sequence[nn.Parameter] = ()
    attempt_store: dist.Store
    buffers: ChangingBuffers | None = None

    def set_up(self, precision: Precision) -> None:
        """Join the process group, make the mesh and find this rank's place in it."""
        join(self.options.timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = self.choose_device()
        shape = self.mesh_shape(self.world_size)
        forget_other_meshes(tuple(shape.items()))
        self.mesh = mesh_for(dist.group.WORLD, self.device.type, tuple(shape.items()))
        self.tensor_parallel_size = shape[TENSOR]
        self.context_parallel_size = shape[CONTEXT]
        self.data_size = shape[REPLICATE] * shape[SHARD]
        self.data_rank = self.rank // (shape[CONTEXT] * shape[TENSOR])
        self.gradient_ranks = self.data_size * shape[CONTEXT]
        self.gradient_group = self.mesh[REPLICATE, SHARD, CONTEXT]._flatten("gradient").get_group()
        super().set_up(precision)

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Choose the sizes of the mesh's dimensions, whose product is ``world_size``.

        Raises:
            ValueError: this world can't be cut that way; the message names the sizes that work.
        """
        return {REPLICATE: world_size, SHARD: 1, CONTEXT: 1, TENSOR: 1}

    def choose_device(self) -> torch.device:
        """Choose the accelerator with this rank's number on its node, else the CPU."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        place = find_place()
        number = place.local_rank
        if place.started_by == SLURM:  # which may show each task only those devices that it is bound to
            number %= torch.accelerator.device_count()
        device = torch.device(accelerator.type, number)
        torch.accelerator.set_device_index(device.index)
        return device

    def step(self, refused: Tensor | None = None) -> None:
        """Step the optimizer, and see which buffers the update has changed."""
        super().step(refused)
        if self.buffers is not None:
            self.buffers.end_update(self.turn_now)

    def skip(self) -> None:
        """Leave the step out, and see which buffers the update has changed."""
        super().skip()
        if self.buffers is not None:
            self.buffers.end_update(self.turn_now)

    def has_news_of_buffers(self) -> bool:
        """Whether ``step`` saw a buffer change that the ranks haven't agreed upon."""
        return self.buffers is not None and self.buffers.has_news

    def share_buffers(self, news: bool) -> None:
        """Agree upon which buffers change, where there is news, and broadcast those from rank 0."""
        if self.world_size == 1:
            return
        if self.buffers is None:
            self.buffers = ChangingBuffers(self.module, self.moved)
        if news:
            self.buffers.agree(self.gather)
        self.buffers.broadcast()
        self.buffers.begin_update()

    def settle(self) -> None:
        """Ask all ranks whether a buffer has changed, and share buffers accordingly."""
        if self.buffers is not None:
            self.buffers.look_for_layers()
            self.share_buffers(any(self.sum_on_host([int(self.buffers.has_news)])))

    def release(self, module: nn.Module) -> None:
        """Let go of the module, of its changing buffers, and of the group that its BatchNorm layers sum over."""
        self.buffers = None
        separate(module)
        super().release(module)

    def build(self, module: nn.Module) -> list[nn.Module]:
        """Build the layers; have BatchNorm compute statistics over all ranks where ``sync_batchnorm`` asks for it."""
        late = super().build(module)
        if self.options.sync_batchnorm:
            synchronize(module, self.gradient_group)
        return late

    def begin_alike(self, module: nn.Module) -> None:
        """Move what was made before ``build``, and broadcast it from rank 0."""
        move_module(module, self.device)
        broadcast_module(module, self.device)

    def prepare_gradients(self) -> None:
        """Average the gradients of whole parameters over ranks, before the precision looks for an overflow."""
        if self.whole_parameters:
            average_gradients(self.whole_parameters, self.gradient_group)
        super().prepare_gradients()

    def sum_over_data_ranks(self, tensor: Tensor) -> Tensor:
        """All-reduce over the ranks with different samples or positions."""
        if self.gradient_ranks > 1:
            dist.all_reduce(tensor, group=self.gradient_group)
        return tensor

    def gather_rows(
        self, rows: Tensor, contributes: bool = True, pad_to: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """All-gather over the ranks with different samples.

        Raises:
            ValueError: ranks share the positions of a sample.
        """
        if self.context_parallel_size > 1:
            raise ValueError(
                "gather() can't be had with context_parallel: a rank holds a part of each sample's positions, and so "
                "no row of a whole sample. Leave context_parallel out."
            )
        if self.data_size == 1:
            return super().gather_rows(rows, contributes, pad_to)
        from .gathered_rows import gather_padded, gather_rows

        if pad_to is None:
            return gather_rows(rows, self.gradient_group, contributes)
        return gather_padded(rows, pad_to, self.gradient_group, contributes)

    def max_over_ranks(self, tensor: Tensor) -> None:
        """All-reduce (MAX) over the world."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def sum_on_host(self, values: list[int]) -> list[int]:
        """Sum over the world, along a tree."""
        return sum_along_tree(values, dist.group.WORLD)

    def new_group(self) -> Any:
        """Make another process group of all ranks, over gloo."""
        return dist.new_group(backend="gloo")

    def drop_group(self, group: Any) -> None:
        """Destroy the group when all ranks are here: a connection closed early cuts off what its other end reads."""
        dist.barrier()
        dist.destroy_process_group(group)

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Gather every rank's value on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def copy_from(self, tensor: Tensor, source: int, to_all: bool) -> None:
        """Broadcast, or send from one rank to the main process, by gloo."""
        if to_all:
            dist.broadcast(tensor, source)
        elif self.rank == source != 0:
            dist.send(tensor, 0)
        elif self.is_main and source != 0:
            dist.recv(tensor, source)

    def gather_to_main(self, value: Any, group: Any = None) -> list[Any]:
        """Gather every rank's value on rank 0."""
        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, values or None, 0, group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Broadcast rank 0's value to every rank."""
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def attempt(self) -> AbstractContextManager[Any]:
        """Make a context in which, over NCCL, a thread looks whether another rank has failed."""
        self.attempt_store = store_of_attempt(dist.distributed_c10d._get_default_store(), self.rank)
        return abort_when_told(self.attempt_store) if "nccl" in backend() else nullcontext()

    def tell_failure(self, reason: str | None) -> str | None:
        """Write the failure into the store, which a rank can use while others wait in a collective."""
        return settle_failure(self.attempt_store, reason)

    def hear_failure(self) -> str | None:
        """Wait until the store holds what another rank has told."""
        return wait_for_failure(self.attempt_store)

    def begin_again(self) -> None:
        """Leave the process group, wait until all others have, and join another one."""
        store, rank, world_size, timeout = self.attempt_store, self.rank, self.world_size, self.options.timeout
        groups = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map]
        del self.mesh, self.gradient_group
        forget_groups()
        leave(waits_for_work=False)
        drop_groups(groups)
        if any(group() is not None for group in groups):
            warnings.warn(
                "Something outside of stratagem still refers to a process group, so that its connections stay open: "
                f"ranks that wait for this one may not notice before their timeout of {timeout:.0f} s.",
                stacklevel=2,
            )
        wait_for_all(store, rank, world_size, timeout)
        join_by(dist.PrefixStore("again", store), rank, world_size, timeout)
        super().begin_again()

    def open_stores(self, name: str) -> tuple[dist.Store, dist.Store] | None:
        """Open a part of the process group's store, and the store that the launcher of the ranks knows."""
        if self.world_size == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        part = f"{name}-{store.add(f'{name}/{self.rank}', 1)}"
        own = store.clone()  # which torch's stub lacks
        own.set_timeout(timedelta(seconds=STORE_SECONDS))
        whole = own
        while isinstance(whole, dist.PrefixStore):
            whole = whole.underlying_store
        return dist.PrefixStore(part, own), dist.PrefixStore(attempt_name(), whole)

    def all_say(self, what: str, seconds: float) -> bool:
        """Compare the ranks' words in the store, which a rank can use while others wait in a collective."""
        store = dist.distributed_c10d._get_default_store()
        return compare_words(store, self.rank, self.world_size, what, seconds)

    def whole(self, tensor: Tensor) -> Tensor:
        """All-gather a sharded tensor."""
        return whole_of(tensor)

    def tear_down(self) -> None:
        """Leave the process group."""
        forget_groups()
        leave()


def join(timeout: float) -> None:
    """Make this process a rank: of the world that the environment describes (see ``find_place``), or of a world of one.

    Args:
        timeout: seconds for every collective.
    """
    if dist.is_initialized():
        return
    place = find_place()
    store = meeting_store(place, timeout) if place.port else dist.HashStore()
    join_by(store, place.rank, place.world_size, timeout)
    atexit.register(leave)


def meeting_store(place: Place, timeout: float) -> dist.Store:
    """Open the store by which the ranks of this attempt meet; rank 0 keeps it where no launcher does.

    A launcher's store outlives a restart; without a prefix of its own, a new attempt would meet the addresses of the
    dead ranks.

    Args:
        place: of this rank.
        timeout: seconds to wait for the others, and for a value.
    """
    store = dist.TCPStore(
        place.address,
        place.port,
        place.world_size,
        is_master=place.rank == 0 and not place.launcher_keeps_store,
        timeout=timedelta(seconds=timeout),
        multi_tenant=True,  # a later Fit in this process meets by the same port
    )
    return dist.PrefixStore(attempt_name(), store)


def attempt_name() -> str:
    """Name the launcher's attempt at the run: the part of its store that the attempt's ranks meet in."""
    place = find_place()
    # Agents of torchrun that came at different times count differently, and rank 0's own store is a new one each time.
    return f"attempt{place.attempt if place.launcher_keeps_store else ''}"


def join_by(store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
    """Join the process group of those who meet by ``store``; nothing may be in it yet."""
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend(), store=store, rank=rank, world_size=world_size, timeout=limit)


def backend() -> str:
    """Name torch's backend: gloo, and where there are GPUs NCCL beside it, for their tensors."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def leave(waits_for_work: bool = True) -> None:
    """Destroy the process group.

    Args:
        waits_for_work: that was begun on GPUs; after a failure it may never end.
    """
    if dist.is_initialized():
        forget_meshes()
        if waits_for_work or "nccl" not in backend():
            dist.destroy_process_group()
        else:
            dist.distributed_c10d._abort_process_group()
        # gloo's threads end a little later; an interpreter that ends before them aborts (pytorch #190489).
        time.sleep(0.2)
