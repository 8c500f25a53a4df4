"""FSDP2's root: big layers outside of the blocks, an embedding and a head as a rule, are gathered for their own forward
alone, and not from the beginning of the whole forward to the end of the backward.

Which layers these are follows from the module's structure. Whether such a layer's parameters are used elsewhere, too
(a loss over the head's weight, a product with the embedding), shows in the forward: asked for outside of the layer's
own forward, they are gathered there and then, stay whole until the backward ends, and their gradients are summed when
all are there, as the root's are. So it goes with a layer that is called twice.

The names with an underscore are torch's own, of 2.9 to 2.13.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .gathering import gather, parameter_groups

SMALLEST = 2**22
"""Numbers in a layer that is worth messages of its own: gathered beside the root's others, it would cost none."""


def root_units(module: nn.Module, blocks: Sequence[nn.Module], kept: set[nn.Parameter]) -> dict[nn.Module, bool]:
    """Find the big layers outside of the blocks, and whether each follows all blocks, so that its backward comes first.

    Such a layer has no layers in it and shares no parameter. Two of them without a block between them may be
    alternatives, of which each rank calls another; they are left to the root, as all is in a module without blocks.

    Args:
        module: the user's.
        blocks: those that are sharded by themselves.
        kept: parameters that aren't sharded.
    """
    if not blocks:
        return {}
    inside = {layer for block in blocks for layer in block.modules()}
    places = Counter(id(p) for layer in module.modules() for p in layer._parameters.values() if p is not None)
    found: dict[int, list[nn.Module]] = {}  # by the number of blocks before it
    passed = 0
    for layer in module.modules():
        passed += layer in blocks
        if layer in inside or layer is module or any(True for _ in layer.children()):
            continue
        own = list(layer.parameters(recurse=False))
        if sum(p.numel() for p in own) >= SMALLEST and all(places[id(p)] == 1 and p not in kept for p in own):
            found.setdefault(passed, []).append(layer)
    return {layers[0]: passed == len(blocks) for passed, layers in found.items() if len(layers) == 1}


class RootUnits:
    """The big layers of a module that are gathered for their own forward: a context around forward and loss.

    Args:
        module: sharded, with the layers.
        layers: of ``root_units``, sharded by themselves.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.contexts = self.forwards = 0  # entered, and not left
        self.loss_may_follow = False
        self.units = [RootUnit(layer, self) for layer in layers]
        if layers:  # after torch's own hook, which reads parameters, too
            module.register_forward_pre_hook(lambda *_: self.begin_forward())
            module.register_forward_hook(lambda *_: self.end_forward(), always_call=True)

    @property
    def watches(self) -> bool:
        """Whether the module's forward runs, or what follows it in the context."""
        return self.forwards > 0 or (self.contexts > 0 and self.loss_may_follow)

    def begin_forward(self) -> None:
        """Enter a forward of the whole module, in which each unit is called once."""
        self.forwards += 1
        for unit in self.units:
            unit.begin_whole_forward()

    def end_forward(self) -> None:
        """Leave it."""
        self.forwards -= 1
        self.loss_may_follow = True

    def __enter__(self) -> None:
        self.contexts += 1
        self.loss_may_follow = False

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self.contexts -= 1
        if not torch.is_grad_enabled():  # no backward follows that would drop what a later forward gathers anyway
            self.reshard()

    def reshard(self) -> None:
        """Drop what is gathered."""
        for unit in self.units:
            unit.layer.reshard()


class RootUnit:
    """One such layer.

    Args:
        layer: sharded by ``fully_shard``.
        among: all of them, which knows whether a forward runs.

    Attributes:
        calls: of its forward, in this forward of the whole module.
        is_kept: whether its parameters are kept whole from the first use to the end of the backward.
    """

    def __init__(self, layer: Any, among: RootUnits) -> None:
        self.layer, self.among = layer, among
        self.is_running, self.is_kept, self.calls = False, False, 0
        layer.set_unshard_in_backward(not isinstance(layer, nn.Embedding))  # whose gradient needs no weight
        layer.register_forward_pre_hook(lambda *_: self.begin_forward(), prepend=True)
        layer.register_forward_hook(lambda *_: self.end_forward(), always_call=True)
        for group in parameter_groups(layer):
            self.defer(group)
        layer.__class__ = watched(type(layer), self.see_use)

    def begin_whole_forward(self) -> None:
        """Count the calls anew."""
        self.calls = 0

    def begin_forward(self) -> None:
        """Note that the layer runs; in a backward, that is a second time and concerns nobody."""
        self.is_running = True
        self.calls += 1
        if self.calls > 1 and self.among.watches:
            self.keep()

    def end_forward(self) -> None:
        """Note that the layer doesn't run any more."""
        self.is_running = False

    def see_use(self, name: str) -> None:
        """Told of each attribute that is no plain one: a parameter asked for outside of the layer's forward is kept."""
        if self.among.watches and not self.is_running and name in self.layer._parameters:
            self.keep()

    def keep(self) -> None:
        """Gather the parameters, unless they are there, and keep them until the backward ends, now and from now on.
        Collective: ranks run the same forward.
        """
        if not self.is_kept:
            self.is_kept = True
            self.layer.set_reshard_after_forward(False)
            self.layer.set_unshard_in_backward(True)
        gather(self.layer)

    def defer(self, group: Any) -> None:
        """Have a kept group's gradients summed at the end of the backward, and not when the layer's own is done."""
        reduce = group.post_backward

        def reduce_at_the_end(*arguments: Any) -> None:
            if not (self.is_kept and torch._C._current_autograd_node() is not None):
                reduce(*arguments)

        group.post_backward = reduce_at_the_end


def watched(own: type, see: Callable[[str], None]) -> type:
    """Make a subclass of a layer's class that tells of each parameter that is asked for."""

    def look_up(layer: Any, name: str) -> Any:
        see(name)
        return own.__getattr__(layer, name)  # type: ignore[attr-defined]

    return type(own.__name__, (own,), {"__getattr__": look_up, "__module__": own.__module__})
