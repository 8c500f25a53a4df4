"""Row: a model of 0.27 billion parameters placed on two ranks that shard it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ... import Fit, TrainModule
from ..two_ranks import on_two_ranks
from .measuring import CPU, PEAK, measuring

TITLE = "0.27 billion float32 parameters (1,026 MiB) placed on 2 ranks: the more burdened rank"
ROUNDS = 3
LIMIT = "by hand, shards drawn"
WIDTH, LAYERS = 2_048, 64
SENT = "MiB sent"


class Tower(nn.Module):
    """Square layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(LAYERS))


class Built(TrainModule):
    """The tower, made in ``build``."""

    def build(self) -> None:
        self.tower = Tower()


class Whole(TrainModule):
    """The tower, made by every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the messages that are sent in here."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.bytes += next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)).nbytes
        return function(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Measure memory, time and traffic."""
    figures: dict[str, float] = {}
    with measuring() as measured, Traffic() as traffic:
        yield figures
    figures |= {PEAK: measured[PEAK], CPU: measured[CPU], SENT: traffic.bytes / 2**20}


def place(make: type[TrainModule]) -> dict[str, float]:
    """Make a module and have Fit place it."""
    with counting() as figures:
        fit = Fit(make(), strategy="fsdp2", progress=False, loggers=(), report=False, output_dir=os.getcwd())
        fit.place()
    fit.close()
    return figures


def built_on_rank() -> dict[str, float]:
    """Late layers."""
    return place(Built)


def whole_on_rank() -> dict[str, float]:
    """Layers that are there from the start."""
    return place(Whole)


def drawn_on_rank() -> dict[str, float]:
    """torch's own means alone: layers on the meta device, and each shard filled by the rank that holds it, with values
    that no other world would give.
    """
    join()
    with counting() as figures:
        with torch.device("meta"):
            tower = Tower()
        shard(tower)
        tower.to_empty(device="cpu")
        for parameter in tower.parameters():
            assert isinstance(parameter, DTensor)
            nn.init.uniform_(parameter.to_local().detach(), -0.02, 0.02)
    return figures


def broadcast_on_rank() -> dict[str, float]:
    """Made whole and broadcast tensor by tensor, as trainers do that synchronize module states."""
    join()
    with counting() as figures:
        tower = Tower()
        for parameter in tower.parameters():
            dist.broadcast(parameter.detach(), src=0)
        shard(tower)
    return figures


def join() -> None:
    """Join the process group."""
    dist.init_process_group("gloo", init_method="env://", rank=int(os.environ["RANK"]))


def shard(tower: Tower) -> None:
    """Shard block by block."""
    for block in tower.blocks:
        fully_shard(block)
    fully_shard(tower)


CONTESTANTS = {
    "stratagem, build()": lambda: on_two_ranks(built_on_rank),
    "stratagem, made in __init__": lambda: on_two_ranks(whole_on_rank),
    "by hand, shards drawn": lambda: on_two_ranks(drawn_on_rank),
    "by hand, whole and broadcast": lambda: on_two_ranks(broadcast_on_rank),
}
