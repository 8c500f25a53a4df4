"""An update as one graph: forward and loss as torch.compile has captured them, with what follows them added.

torch.compile captures forward and loss, guards all that they depend on in Python, and hands the graph to a backend.
This backend adds the gradients, clipping, the optimizer's step and the decision whether the update is made at all, and
has inductor compile the whole.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim.traced_step import Slot, options_of, slots_of, traced_step
from .replay import Replay


def mark_loss(loss: Tensor) -> Tensor:
    """Return the loss. The call stands in the captured graph, so that the loss is found among the outputs."""
    return loss.view_as(loss)


class Held:
    """What an update changes, and what it is made with, beside the module.

    Args:
        optimizer: of the run. Its state is there for every parameter that has a gradient.
        trainable: parameters whose gradients are computed, in the module's order.
        max_norm: that gradients are clipped to; 0 where they aren't.
        rates: a learning rate for each group of the optimizer, on the device.

    Attributes:
        slots: the tensors of the optimizer's state; each program is made for these.
        measure: of the last update: the norm of its gradients or, where they aren't clipped, the sum of their norms.
        each: the norms of its gradients.
        normed: the parameters that those are of.
    """

    def __init__(self, optimizer: Optimizer, trainable: Sequence[nn.Parameter], max_norm: float, rates: Tensor) -> None:
        self.optimizer, self.trainable, self.max_norm, self.rates = optimizer, trainable, max_norm, rates
        self.slots: list[Slot] = []
        self._entries: list[dict[str, Any]] = []  # the state of each parameter, in the optimizer's order
        self._places: list[tuple[dict[str, Any], str]] = []  # where the tensors of the slots are
        self._options: list[tuple[Callable[[Any], Any], Any]] = []  # what reads those of a group, and what they were
        self.measure: Tensor | None = None
        self.each: Tensor | None = None
        self.normed: Sequence[nn.Parameter] = ()

    def hold(self) -> None:
        """Take the optimizer's state and options as they are now."""
        state, groups = self.optimizer.state, self.optimizer.param_groups
        self.slots, self._entries = slots_of(self.optimizer), list(state.values())
        self._places = [(state[slot.parameter], slot.key) for slot in self.slots]
        readers = [itemgetter(*options) for options in options_of(self.optimizer)]
        self._options = [(read, read(group)) for read, group in zip(readers, groups, strict=True)]

    def is_current(self) -> bool:
        """Whether the optimizer has the options and the state, but for values in it, that were taken last."""
        groups, entries = self.optimizer.param_groups, self._entries
        if len(groups) != len(self._options) or len(self.optimizer.state) != len(entries):
            return False
        for group, (read, options) in zip(groups, self._options, strict=True):
            if read(group) != options:
                return False
        for now, then in zip(self.optimizer.state.values(), entries, strict=True):  # noqa: SIM110 (faster so)
            if now is not then:
                return False
        return True

    def tensors(self) -> list[Tensor]:
        """The tensors of the optimizer's state, as they are now."""
        return [entries[key] for entries, key in self._places]

    def note(self, measure: Tensor, each: Tensor, normed: Sequence[nn.Parameter]) -> None:
        """Note what an update found of its gradients."""
        self.measure, self.each, self.normed = measure, each, normed


class WholeUpdate(nn.Module):
    """A whole update as a function of tensors, which changes parameters and the optimizer's state in place.

    Args:
        graph: forward and loss, as torch.compile has captured them.
        held: what the update changes.
        inputs: of the graph; the parameters are among them.
    """

    def __init__(self, graph: torch.fx.GraphModule, held: Held, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.graph, self.held, self.count = graph, held, len(inputs)
        place = {id(value): number for number, value in enumerate(inputs)}
        self.parameters_at = {place[id(p)]: p for p in held.trainable if id(p) in place}
        [output] = [node for node in graph.graph.nodes if node.op == "output"]
        [loss] = [node for node in graph.graph.nodes if node.target is mark_loss]
        self.loss_at = list(output.args[0]).index(loss)
        self.normed: list[nn.Parameter] = []

    def forward(self, *values: Any) -> list[Any]:
        """Make the update.

        Args:
            *values: the graph's inputs, the optimizer's state, and the learning rates.

        Returns:
            The outputs of forward and loss, then what the update found of its gradients, see Held.
        """
        held, inputs = self.held, list(values[: self.count])
        state = {
            (id(slot.parameter), slot.key): value
            for slot, value in zip(held.slots, values[self.count : -1], strict=True)
        }
        with torch.enable_grad():
            leaves = {at: inputs[at].detach().requires_grad_() for at in self.parameters_at}
            outputs = self.graph(*(leaves.get(at, value) for at, value in enumerate(inputs)))
            found = torch.autograd.grad(outputs[self.loss_at], list(leaves.values()), allow_unused=True)
        gradients = {
            id(self.parameters_at[at]): gradient
            for at, gradient in zip(leaves, found, strict=True)
            if gradient is not None
        }
        self.normed = [parameter for parameter in held.trainable if id(parameter) in gradients]
        with torch.no_grad():
            measure, each = self.clip(gradients)
            at_of = {id(parameter): at for at, parameter in self.parameters_at.items()}
            targets = {key: inputs[at_of[key]].detach() for key in gradients}
            before = {key: target.clone() for key, target in targets.items()}
            state_before = {key: value.clone() for key, value in state.items()}
            after = traced_step(held.optimizer, targets, gradients, state, values[-1].unbind())
            made = measure.isfinite()
            for key, target in targets.items():
                target.copy_(torch.where(made, target, before[key]))
            for entry, value in after.items():
                state[entry].copy_(torch.where(made, value, state_before[entry]))
        detached = [value.detach() if isinstance(value, Tensor) else value for value in outputs]
        return [*detached, measure, each]

    def clip(self, gradients: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Clip the gradients as ``Updating.clip_grad_norm`` does, in the mapping. Returns what Held notes of them."""
        chosen = [gradients[id(parameter)] for parameter in self.normed]
        dtype = None if chosen[0].dtype.itemsize > 2 else torch.float32
        each = torch.stack([torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in chosen])
        if not self.held.max_norm:
            return each.sum(), each
        norm: Tensor = torch.linalg.vector_norm(each)
        factor = (self.held.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for key, gradient in gradients.items():
            gradients[key] = (gradient * factor).to(gradient.dtype)
        return norm, each


def compile_update(
    graph: torch.fx.GraphModule,
    inputs: Sequence[Any],
    held: Held,
    backend: str,
    options: dict[str, Any],
    replays: bool = False,
) -> Callable[..., Sequence[Any]]:
    """Compile an update; a backend of torch.compile's, but for the last four arguments.

    Args:
        graph: forward and loss.
        inputs: that the graph was captured with.
        held: what the update changes.
        backend: what compiles, see ``fields/compilation.py``.
        options: of inductor.
        replays: whether a CUDA graph of the program is replayed.

    Returns:
        A function of the graph's inputs that makes the update and returns the graph's outputs.
    """
    update = WholeUpdate(graph, held, inputs)
    values = [*inputs, *held.tensors(), held.rates]
    compiled: Any
    with torch.no_grad():
        if backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            compiled = compile_fx(update, values, config_patches=options)  # type: ignore[arg-type]
        else:
            from torch._dynamo.backends.registry import lookup_backend

            compiled = lookup_backend(backend)(update, values)  # type: ignore[arg-type]
    from torch._dynamo.eval_frame import innermost_fn

    whole = innermost_fn(compiled)  # without a wrapper that keeps torch.compile from looking inside, as nothing asks it

    if replays:
        whole = Replay(whole)

    def run(*values: Any) -> Sequence[Any]:
        *outputs, measure, each = whole(*values, *held.tensors(), held.rates)
        held.note(measure, each, update.normed)
        return outputs

    return run
