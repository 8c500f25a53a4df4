"""Gradients that a forward or a loss itself computes, by torch.autograd.grad: a gradient penalty, forces of an energy.

torch takes the first gradient that comes to a unit for the update's backward: when it is done all units are sharded
again, in the middle of the forward, and the memory is given back of parameters that gradients of gradients
(``create_graph=True``) will be computed with. Here such a gradient gathers the units that it passes, and they stay
whole to the end of the update's backward, where their own gradients are summed once.

With tensor parallelism, torch's gradient of the whole input of a layer whose outputs are cut is a sum over the ranks of
which no gradient can be computed: the part of a penalty that goes through it would be missing, without an error. Within
a forward, that sum is one of those that can.

The names with an underscore are torch's own, of 2.9 to 2.13.
"""

from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, _redistribute
from torch.distributed.tensor._api import _FromTorchTensor

from .gathering import gather, parameter_groups


class GradientsInForward:
    """A context around forward and loss, in which gradients may be computed.

    Args:
        module: sharded, with its units.
        layers_are_cut: by tensor parallelism.
        classes_are_cut: by loss parallelism, too.
    """

    def __init__(self, module: nn.Module, layers_are_cut: bool, classes_are_cut: bool) -> None:
        self.layers_are_cut, self.classes_are_cut = layers_are_cut, classes_are_cut
        self.contexts = 0  # entered, and not left
        self.root = fully_shard.state(module)  # type: ignore[attr-defined]
        self.units = [PassedUnit(layer, self) for layer in module.modules() if isinstance(layer, FSDPModule)]

    def __enter__(self) -> None:
        self.contexts += 1
        if self.layers_are_cut:
            _FromTorchTensor.backward = staticmethod(gradient_of_part)  # type: ignore[method-assign,assignment]

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self.contexts -= 1
        if self.layers_are_cut and not self.contexts:
            _FromTorchTensor.backward = TORCHS  # type: ignore[method-assign]
        if not torch.is_grad_enabled():  # no backward follows
            self.reshard()

    def check(self) -> None:
        """Refuse gradients of gradients where torch can't compute them.

        Raises:
            ValueError: says what works.
        """
        if not torch.is_grad_enabled():
            return
        if self.layers_are_cut and not CAN_DIFFERENTIATE_TWICE:
            raise ValueError(
                f"Tensor parallelism: torch {torch.__version__} computes no gradients of gradients (create_graph=True) "
                "through layers that are cut. Install torch 2.13 or newer, or use strategy='fsdp2' or 'ddp'."
            )
        if self.classes_are_cut:
            raise ValueError(
                "loss_parallel=True: the cross entropy of classes that are cut has no gradients of gradients "
                "(create_graph=True). Leave loss_parallel out."
            )

    def see_loss(self, loss: Tensor) -> None:
        """Told of a loss before its backward, which may reach a unit by gradients of gradients alone: then no hook of
        torch's sums its gradients.
        """
        if any(unit.is_kept for unit in self.units):
            loss.register_hook(lambda _: self.root._register_root_post_backward_final_callback())

    def reshard(self) -> None:
        """Drop what is gathered."""
        for unit in self.units:
            if unit.is_kept:
                unit.let_go()
                unit.layer.reshard()


TORCHS = staticmethod(_FromTorchTensor.backward)
CAN_DIFFERENTIATE_TWICE = hasattr(_redistribute, "NestedRedistribute")


def gradient_of_part(ctx: Any, gradient: Any) -> tuple[Tensor | None, ...]:
    """Compute what torch's backward of ``DTensor.from_local`` does, by operations that have gradients themselves."""
    others = [None] * (len(ctx.needs_input_grad) - 1)
    if gradient is None:
        return None, *others
    wanted = getattr(ctx, "grad_placements", None)
    if wanted is None:
        wanted = [Replicate() if placement.is_partial() else placement for placement in ctx.forward_input_placements]
    return gradient.redistribute(placements=wanted).to_local(), *others


class PassedUnit:
    """A unit that such a gradient may pass.

    Args:
        layer: sharded by ``fully_shard``.
        among: knows whether a forward runs.

    Attributes:
        is_kept: whether the unit stays whole to the end of the backward.
        drops: whether it drops its parameters after each forward otherwise.
    """

    def __init__(self, layer: Any, among: GradientsInForward) -> None:
        self.layer, self.among = layer, among
        self.is_kept = self.drops = False
        self.groups = parameter_groups(layer)
        state = fully_shard.state(layer)  # type: ignore[attr-defined]
        state._pre_backward = partial(self.begin_backward, state._pre_backward)
        for group in self.groups:
            group.post_backward = partial(self.end_backward, group.post_backward)

    def begin_backward(self, begin: Any, gradient: Tensor) -> Tensor:
        """Called when a gradient comes to the unit's outputs."""
        if self.among.contexts:
            self.among.check()
            self.keep()
            return gradient
        begun: Tensor = begin(gradient)
        return begun

    def end_backward(self, end: Any, *arguments: Any) -> None:
        """Called when a gradient has come to the unit's inputs, and when the backward is over."""
        if self.among.contexts or (self.is_kept and torch._C._current_autograd_node() is not None):
            return
        end(*arguments)
        if self.is_kept:
            self.let_go()

    def keep(self) -> None:
        """Gather the unit, unless it is, and keep it whole. Collective: ranks run the same forward."""
        if not self.is_kept:
            self.is_kept = True
            self.drops = any(group._reshard_after_forward for group in self.groups)
            if self.drops:
                self.layer.set_reshard_after_forward(False, recurse=False)
        gather(self.layer)

    def let_go(self) -> None:
        """Have the unit drop its parameters after each forward again, where it did."""
        self.is_kept = False
        if self.drops:
            self.layer.set_reshard_after_forward(True, recurse=False)
