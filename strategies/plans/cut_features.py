"""Whole parameters that are used on cut features: found in the graph of the first update, their gradients summed.

Between a layer that tensor parallelism cuts by its outputs and the one that is cut by its inputs, each rank computes
features of its own. A parameter that every rank holds whole and that is used there (the norm on heads of Qwen3 and
Gemma3, a scale, a bias, a gate) is given by each rank's backward the part of its gradient that comes from this rank's
features: the gradient is the sum. One that is used on whole features is given the whole gradient by each, and a sum
would be that many times too large. The tensors between the two layers are plain ones, so nothing in them tells which.

The graph does. Walking from the input of a layer that takes cut features back to the outputs of cut layers, one meets
the parameters whose use there has nothing between itself and the cut input, and these are all of them: their gradient
arrives through that input alone, and is a sum over the ranks. Nothing is concluded from numbers, which may be equal by
symmetry or because they are zero, nor from names. Parameters that are met on other ways too, from the loss or from the
input of a layer that takes whole features, have a gradient of which one part is a sum and another isn't: the two
can't be told apart afterwards, and such a module is refused, as is one whose whole activations reach cut features
without a layer that cuts them, since everything before those would lack the other ranks' part.

The walk is made in each micro-batch of the first update, and after it for as long as a whole parameter has never had a
gradient. From then on the sum costs one all-reduce an update, of all such gradients end to end, and nothing where there
are none. Compiled blocks have no graph to walk through: the first forward is made once more before it, without
compilation and without a trace, so that what is computed is the same from the first update on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ParallelStyle, SequenceParallel
from torch.utils._pytree import tree_leaves

from ..gradient_norm import cuts_tensor

CUT, WHOLE, UNKNOWN = "cut", "whole", "unknown"  # what a layer of the plan takes and gives

Gather = Callable[[Any], list[Any]]
"""Every rank's value on every rank."""


def features(style: ParallelStyle) -> tuple[str, str]:
    """What a layer of that style takes and gives; a style of the user's own isn't known."""
    if isinstance(style, SequenceParallel):
        return CUT, CUT
    return _kind(getattr(style, "input_layouts", None)), _kind(getattr(style, "output_layouts", None))


def _kind(layouts: Any) -> str:
    if not isinstance(layouts, tuple) or len(layouts) != 1:
        return UNKNOWN
    return CUT if cuts_tensor(layouts[0]) else WHOLE if isinstance(layouts[0], Replicate) else UNKNOWN


class CutFeatures:
    """Finds the whole parameters of a module whose gradients are sums over the tensor-parallel ranks, and sums them.

    Args:
        module: cut by its plan, not yet sharded.
        styles: of the layers that are cut, by name.
        stated: layers whose plan says what their own parameters are used on, CUT or WHOLE. Nothing is sought for those.
        group: the tensor-parallel ranks.
        gather: over all ranks.

    Attributes:
        unsettled: the trainable whole parameters of which it isn't known yet.
        partial: those whose gradients are summed.
    """

    def __init__(
        self,
        module: nn.Module,
        styles: Mapping[str, ParallelStyle],
        stated: Mapping[str, str],
        group: dist.ProcessGroup,
        gather: Gather,
    ) -> None:
        self.module, self.group, self.gather = module, group, gather
        self.styles = dict(styles)
        whole = {n: p for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)}
        named = {name: stated[layer] for name in whole if (layer := name.rpartition(".")[0]) in stated}
        self.partial = {name for name, kind in named.items() if kind == CUT}
        self.unsettled = whole.keys() - named.keys()
        self.parameters: dict[str, nn.Parameter] | None = None  # as they are placed
        self.walk: Walk | None = None
        self.begun: set[str | None] = set()  # turns that have made an update; None without turns

    def watch(self, compiled: bool, turn: str | None = None) -> AbstractContextManager[None]:
        """Entered around the forward and backward of a micro-batch.

        Args:
            compiled: whether the module's blocks are. There is no graph to walk through in those.
            turn: that is made, where the module is trained in turns; each has a first update.
        """
        if not self.unsettled or (compiled and turn in self.begun):
            return nullcontext()
        return self._watch(compiled)

    @contextmanager
    def _watch(self, compiled: bool) -> Iterator[None]:
        self.walk = self.walk or Walk(self.module, self.styles)
        with self.walk.rehearsed() if compiled else self.walk.hooked():
            try:
                yield
            finally:
                self.walk.forget()

    def see_loss(self, loss: Tensor) -> None:
        """Told of a loss before its backward: what it uses directly is used on whole features."""
        if self.walk is not None:
            self.walk.from_whole(loss)

    @torch.no_grad()
    def sum_gradients(
        self, named_parameters: Callable[[], Mapping[str, nn.Parameter]], turn: str | None = None
    ) -> None:
        """After the last backward of an update: sum the gradients that are parts. Collective over the tensor-parallel
        ranks; over all of them where something was found out.

        Args:
            named_parameters: the module's parameters as they are placed.
            turn: that is made.
        """
        if self.parameters is None:
            self.parameters = {n: p for n, p in named_parameters().items() if n in self.unsettled or n in self.partial}
        if self.unsettled:
            self.settle(self.parameters, turn)
        if not self.partial:
            return
        gradients = [g for name in sorted(self.partial) if (g := self.parameters[name].grad) is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        if local:
            sum_over(local, self.group)

    def settle(self, parameters: Mapping[str, nn.Parameter], turn: str | None = None) -> None:
        """Decide, of the parameters that have their first gradient. Collective where there are any.

        Raises:
            ValueError: a parameter is used on both kinds of features, or whole features reach cut ones uncut.
        """
        new = {name for name in self.unsettled if parameters[name].grad is not None}
        if not new and turn in self.begun:
            return
        self.begun.add(turn)
        walk = self.walk
        self.walk = None
        seen = ("", set(), set()) if walk is None else (walk.trespass, walk.cut, walk.whole)
        # All ranks are asked, not the tensor-parallel ones alone: other samples may take other ways through the module.
        trespasses, cuts, wholes, watched = zip(*self.gather((*seen, walk is not None)), strict=True)
        cut = set().union(*cuts)
        check(new, next(filter(None, trespasses), ""), cut, set().union(*wholes), all(watched))
        self.partial |= new & cut
        self.unsettled -= new


def check(new: set[str], trespass: str, cut: set[str], whole: set[str], watched: bool) -> None:
    """Refuse parameters whose gradients can't be summed.

    Args:
        new: parameters that have their first gradient.
        trespass: how whole activations reach cut features; "" where they don't.
        cut: parameters used on cut features.
        whole: parameters used on whole features.
        watched: whether the graphs were walked through.

    Raises:
        ValueError: says why, and the way out.
    """
    if trespass:
        raise ValueError(
            f"tensor_parallel_plan: {trespass}, so that the gradient of everything before it would lack the other "
            'ranks\' part. Have a layer that the plan cuts ("colwise") come between, leave the layers out of the plan, '
            "or use strategy='fsdp2', which needs none."
        )
    both = sorted(new & cut & whole)
    if both:
        raise ValueError(
            f"Tensor parallelism: {', '.join(both[:10])} is used on features that the plan cuts and on whole ones. Its "
            "gradient is a sum over ranks in one part and whole in the other, which can't be told apart. Hold two "
            "parameters, leave the layers around out of the plan, or use strategy='fsdp2', which needs no plan. Where "
            "it seems so because the loss computes a gradient itself (torch.autograd.grad), say in the plan of the "
            'layer that holds it which it is: "used_on_cut" or "used_on_whole".'
        )
    if not watched and new:
        raise ValueError(
            f"Tensor parallelism: {', '.join(sorted(new)[:10])} had no gradient in the first update, and now has one "
            "in compiled blocks, where it can't be seen on which features it is used. Say so in tensor_parallel_plan, "
            'of the layer that holds it: "used_on_cut" or "used_on_whole".'
        )


class Walk:
    """The parameters met on the ways back from inputs of layers of the plan, and from the loss.

    Args:
        module: the placed module.
        styles: of the layers that are cut, by name.

    Attributes:
        cut, whole: names of parameters met on the way from cut features and from whole ones.
        trespass: how whole activations reach cut features.
    """

    def __init__(self, module: nn.Module, styles: Mapping[str, ParallelStyle]) -> None:
        self.module = module
        self.features = {name: features(style) for name, style in styles.items()}
        self.cut: set[str] = set()
        self.whole: set[str] = set()
        self.trespass = ""
        self.forget()

    def forget(self) -> None:
        """Let go of the graph."""
        # Nodes are known by identity, which lasts as long as they are referred to.
        self.given: dict[Node, tuple[str, str]] = {}  # by layers of the plan: (layer, kind)
        self.visited: dict[str, set[Node]] = {CUT: set(), WHOLE: set()}
        self.names: dict[int, tuple[Tensor, str]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook the layers of the plan, in here, so that every forward is seen."""
        layers = dict(self.module.named_modules())
        handles = [
            handle
            for name, (takes, gives) in self.features.items()
            for handle in (
                # Before the style's own hook, which makes a DTensor of the input, and after the one of the output.
                layers[name].register_forward_pre_hook(partial(self.take, name, takes), prepend=True),
                layers[name].register_forward_hook(partial(self.give, name, gives)),
            )
        ]
        # FSDP's own hooks come first: a unit's parameters are gathered then.
        units = [name for name, layer in layers.items() if isinstance(layer, FSDPModule)]
        handles += [layers[n].register_forward_pre_hook(partial(self.name_parameters, n)) for n in units]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """In here the first forward is made twice: once without compilation, to be seen, and without a trace."""

        def rehearse(module: nn.Module, args: Any, kwargs: Any) -> None:
            handle.remove()
            buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
            device = next((p.device for p in module.parameters() if p.device.type == "cuda"), None)
            with torch.random.fork_rng([device] if device else []), torch.compiler.set_stance("force_eager"):
                with self.hooked():
                    self.name_parameters("", module, None)  # the hooks of this call have run already
                    outputs = module.forward(*args, **kwargs)
                for leaf in tree_leaves(outputs):
                    self.from_whole(leaf)
            self.forget()  # nothing in the compiled graph tells its layers
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

        handle = self.module.register_forward_pre_hook(rehearse, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def name_parameters(self, prefix: str, unit: nn.Module, _: Any) -> None:
        """Note the names of a unit's parameters as they are while it computes."""
        for name, parameter in unit.named_parameters(prefix, remove_duplicate=False):
            self.names.setdefault(id(parameter), (parameter, name))

    def take(self, name: str, kind: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Walk back from the inputs that a layer of the plan is given."""
        for leaf in tree_leaves(inputs):
            self.back_from(leaf, kind, name)

    def give(self, name: str, kind: str, layer: nn.Module, inputs: Any, outputs: Any) -> None:
        """Note the outputs of a layer of the plan, where a later walk stops."""
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self.given[get_gradient_edge(leaf).node] = name, kind

    def from_whole(self, tensor: Any) -> None:
        """Walk back from the loss, or an output."""
        self.back_from(tensor, WHOLE, "the loss")

    def back_from(self, tensor: Any, kind: str, taker: str) -> None:
        """Walk back from a tensor to the outputs of layers of the plan, and note the parameters met on the way."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or kind == UNKNOWN:
            return
        if isinstance(tensor, DTensor) and kind == CUT:
            return  # a DTensor knows by itself how it is cut
        visited, found = self.visited[kind], self.cut if kind == CUT else self.whole
        stack = [get_gradient_edge(tensor).node]
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            if node in self.given:
                giver, gives = self.given[node]
                if kind == CUT and gives == WHOLE:
                    self.trespass = self.trespass or (
                        f"{taker!r} takes features that are cut over ranks, and what {giver!r} gives whole gets there"
                    )
                continue
            variable = getattr(node, "variable", None)
            if variable is not None:
                if id(variable) in self.names:
                    found.add(self.names[id(variable)][1])
                continue
            stack += [before for before, _ in node.next_functions if before is not None]


def sum_over(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce tensors in place in one message, at least in float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
