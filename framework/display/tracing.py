"""One forward of a copy of a module that no layer of the run takes part in: shapes, and floating-point operations."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from ...strategies.batches import tensors_of
from ..calling import forward_call
from ..measures.parameters import Layer, numbers_of
from ..module import TrainModule

MOST_NUMBERS = 10**9  # in a module of which a copy with memory is made, where one without doesn't do


@dataclass(frozen=True)
class Traced:
    """What a layer did in one forward.

    Attributes:
        inputs, outputs: the shapes of the tensors in its first call.
        flops: floating-point operations, of the layers below it too, in all its calls.
    """

    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    flops: int


class NotTraceable(Exception):
    """A forward of a copy can't be computed; the message is a sentence for a person."""


def trace(module: TrainModule, layers: tuple[Layer, ...], batch: Any) -> dict[str, Traced]:
    """Compute a forward of a copy of the module, in evaluation mode, and watch its layers.

    The copy has no memory (torch's meta device), so that a large module costs nothing; where its forward reads numbers
    on the way, a copy with memory computes it on the host. The caller keeps random states.

    Args:
        module: as it was given to Fit, or placed.
        layers: of the whole module, as ``layers_of`` or its placement lists them.
        batch: on the host.

    Returns:
        Layer name to what it did; layers that weren't called are left out.

    Raises:
        NotTraceable: says why.
    """
    if not is_whole(module, layers):
        raise NotTraceable("this rank has a part of the placed module; they are found before training begins")
    try:
        return watch(meta_copy(module), tree_map(to_meta, batch), torch.device("meta"))
    except Exception as error:
        first = error
    if sum(parameter.numel() for parameter in module.parameters()) > MOST_NUMBERS:
        raise NotTraceable(
            f"forward can't be computed without its numbers ({describe(first)}), and a copy of so large a module isn't "
            "made for that"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise NotTraceable(f"forward can't be computed without numbers ({describe(first)}), which build() leaves out")
    try:
        return watch(host_copy(module), batch, nullcontext())
    except Exception as error:
        raise NotTraceable(f"a forward of one sample fails ({describe(error)})") from error


def is_whole(module: nn.Module, layers: tuple[Layer, ...]) -> bool:
    """Whether this rank has the whole module, whose layers were listed before it was placed."""
    plain = all(type(parameter) in (Tensor, nn.Parameter) for parameter in module.parameters())
    return plain and (layers[0].trainable, layers[0].frozen) == numbers_of(module.parameters())


def watch(module: TrainModule, batch: Any, context: AbstractContextManager[Any]) -> dict[str, Traced]:
    """Call a copy on a batch, and note what its layers did."""
    counter = FlopCounterMode(display=False)
    found: dict[str, Traced] = {}
    begun: list[int] = []

    def before(_: nn.Module, arguments: Any, named: Any) -> None:
        begun.append(counter.get_total_flops())

    def after(name: str) -> Callable[..., None]:
        def note(_: nn.Module, arguments: Any, named: Any, outputs: Any) -> None:
            flops = counter.get_total_flops() - begun.pop()
            earlier = found.get(name)
            if earlier is None:
                found[name] = Traced(shapes((arguments, named)), shapes(outputs), flops)
            else:
                found[name] = Traced(earlier.inputs, earlier.outputs, earlier.flops + flops)

        return note

    module.eval()
    for name, layer in module.named_modules():
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after(name), with_kwargs=True)
    # Fused attention has no FLOPs that the counter knows on every device; its mathematics do.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), context, counter:
        forward_call(module)(module, batch)
    return found


def meta_copy(module: TrainModule) -> TrainModule:
    """A copy whose parameters and buffers have shapes and no memory, in one floating-point dtype."""
    stand_ins: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        shape = to_meta(tensor.detach())
        shape = shape.float() if shape.is_floating_point() else shape
        trains = tensor.requires_grad
        stand_ins[id(tensor)] = nn.Parameter(shape, trains) if isinstance(tensor, nn.Parameter) else shape
    return bare(copy.deepcopy(module, stand_ins))


def built(module: TrainModule) -> TrainModule:
    """A copy without memory, whose late layers are made."""
    whole = meta_copy(module)
    with torch.device("meta"):
        whole.build()
    return whole


def host_copy(module: TrainModule) -> TrainModule:
    """A copy with memory of its own, on the host."""
    stand_ins: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        whole = tensor.detach().cpu().clone()
        whole = whole.float() if whole.is_floating_point() else whole
        trains = tensor.requires_grad
        stand_ins[id(tensor)] = nn.Parameter(whole, trains) if isinstance(tensor, nn.Parameter) else whole
    return bare(copy.deepcopy(module, stand_ins))


def bare(module: TrainModule) -> TrainModule:
    """Take off a copy what a run, or its user, has put around the forwards of layers: hooks hear of the run alone."""
    for layer in module.modules():
        vars(layer)["_forward_hooks"], vars(layer)["_forward_pre_hooks"] = OrderedDict(), OrderedDict()
        if isinstance(vars(layer).get("forward"), MethodType):  # checkpointed or compiled
            del vars(layer)["forward"]
    return module


def to_meta(value: Any) -> Any:
    """The shape of a tensor, on the meta device; anything else as it is."""
    return value.to("meta") if isinstance(value, Tensor) else value


def shapes(value: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of the tensors in a value."""
    return tuple(tuple(tensor.shape) for tensor in tensors_of(value))


def size_in_bytes(module: nn.Module) -> int:
    """What the numbers of a module take in memory, wherever they are."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def describe(error: BaseException) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
