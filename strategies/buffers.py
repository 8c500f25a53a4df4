"""Buffers that training's forward changes (batch statistics, moving averages): one rule under every strategy.

Every rank changes its own. Before the first forward of an update, and wherever the model is evaluated, saved or
exported, rank 0's are everybody's. That is what DistributedDataParallel does, so a curve is the same under all
strategies, and it suits any buffer: a mean over ranks would be better statistics, but no counter, queue or pointer.

Buffers that nothing changes (positions, rotary tables) cost no traffic. Which ones change is seen by each rank for
itself, and told in the message that the ranks exchange once an update anyway.
"""

import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from ..precision.complex_numbers import as_real

BROADCAST_BYTES = 2**28  # at most so many bytes go into one message
Name = tuple[str, str]  # of a layer, and of its buffer
Shapes = dict[Name, tuple[tuple[int, ...], str]]  # buffer to (shape, dtype)
Gather = Callable[[Any], list[Any]]


class ChangingBuffers:
    """Finds the buffers that change in an update, and keeps them the same on all ranks.

    A change is seen by the tensor's version, or by its being another tensor; in the first update (of each turn, where
    there are turns) by its values too, because some kernels write without telling: torch's own do so with the
    statistics of a BatchNorm.

    Args:
        module: the user's, placed.
        turns: by name, where it is trained in turns.

    Attributes:
        has_news: whether this rank saw a change, or a shape, that the ranks haven't agreed upon.
    """

    def __init__(self, module: nn.Module, turns: Collection[str] = ()) -> None:
        self.module = module
        self.unmade: set[str | None] = set(turns)  # those that have made no update yet
        self.layers: dict[str, nn.Module] = {}  # those that have buffers
        self.changing: set[Name] = set()
        self.shared: Shapes = {}  # those that change, and can be broadcast
        self.watched: list[tuple[Name, dict[str, Tensor | None]]] = []  # those that don't change, so far
        self.seen: list[tuple[Name, Tensor | None, int]] = []  # how they were before the update
        self.values: dict[Name, Tensor] | None = None  # before the first update, until each turn has made one
        self.is_first = True
        self.has_news = False
        self.look_for_layers()

    def look_for_layers(self) -> None:
        """Take in buffers that were registered since; those count as changing. A walk over the whole module."""
        first = not self.layers
        self.layers = {name: layer for name, layer in self.module.named_modules() if layer._buffers}
        found = [((name, key), layer._buffers) for name, layer in self.layers.items() for key in layer._buffers]
        new = {name for name, _ in found} - {name for name, _ in self.watched} - self.changing
        if new and not first:
            self.changing |= new
            self.has_news = True
        self.watched = [(name, buffers) for name, buffers in found if name not in self.changing]

    def begin_update(self) -> None:
        """Note the present versions of the buffers that nothing has changed so far."""
        self.seen = [(name, buffers[name[1]], version(buffers[name[1]])) for name, buffers in self.watched]
        if self.is_first:
            self.is_first = False
            self.values = {name: buffer.detach().clone() for name, buffer, _ in self.seen if buffer is not None}

    def end_update(self, turn: str | None = None) -> None:
        """See what has changed since ``begin_update``, after the step of a turn where there are turns."""
        for (name, before, count), (_, buffers) in zip(self.seen, self.watched, strict=False):
            buffer = buffers[name[1]]
            if buffer is not before or version(buffer) != count or self.has_other_values(name, buffer):
                self.has_news = True
                layer = self.layers[name[0]]
                keys = layer._buffers if isinstance(layer, _NormBase) else (name[1],)
                self.changing |= {(name[0], key) for key in keys}
        self.unmade -= {turn}
        if not self.unmade:
            self.values = None
        for (layer_name, key), (shape, _) in self.shared.items():
            now = self.layers[layer_name]._buffers.get(key)
            if now is None or now.shape != shape:
                self.has_news = True

    def has_other_values(self, name: Name, buffer: Tensor | None) -> bool:
        """Whether a buffer isn't what it was before the first update; known until each turn has made one."""
        return self.values is not None and buffer is not None and not torch.equal(self.values[name], buffer)

    def agree(self, gather: Gather) -> None:
        """Exchange which buffers change. Collective, and rare: after the first update, as a rule, and never again.

        Args:
            gather: every rank's value, on every rank.
        """
        self.changing = set().union(*gather(self.changing))
        mine = dict(self.local_shapes())
        everyones: list[Shapes] = gather(mine)
        self.shared = {name: is_ for name, is_ in mine.items() if all(other.get(name) == is_ for other in everyones)}
        others = {name for other in everyones for name in other} - self.shared.keys()
        if others:
            names = ", ".join(sorted(".".join(name).lstrip(".") for name in others))
            warnings.warn(
                f"These buffers change in forward, and have other shapes or dtypes on other ranks: {names}. Each rank "
                "keeps its own; rank 0's are saved.",
                stacklevel=2,
            )
        self.watched = [(name, buffers) for name, buffers in self.watched if name not in self.changing]
        self.has_news = False

    def local_shapes(self) -> Iterator[tuple[Name, tuple[tuple[int, ...], str]]]:
        """Shapes and dtypes of this rank's buffers that change, in an order that all ranks have."""
        for name in sorted(self.changing):
            buffer = self.layers[name[0]]._buffers.get(name[1]) if name[0] in self.layers else None
            if buffer is not None:
                yield name, (tuple(buffer.shape), str(buffer.dtype))

    @torch.no_grad()
    def broadcast(self) -> None:
        """Broadcast rank 0's changing buffers, in one message for each dtype. Collective where any buffer changes."""
        if self.shared:
            tensors = [sendable(self.layers[layer]._buffers[key]) for layer, key in self.shared]
            world = dist.group.WORLD
            assert world is not None
            dist._broadcast_coalesced(world, tensors, BROADCAST_BYTES, 0)


def version(buffer: Tensor | None) -> int:
    """How often a tensor was changed in place; 0 where it can't be."""
    return 0 if buffer is None or buffer.is_inference() else buffer._version


def sendable(buffer: Tensor | None) -> Tensor:
    """A view of a buffer's own numbers, as the backends can send them."""
    assert buffer is not None
    local = buffer.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    return as_real(local)
