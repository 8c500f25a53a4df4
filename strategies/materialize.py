"""Late layers: built without memory, sharded, and then filled layer by layer, so that no rank holds the whole model."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.weak import WeakTensorKeyDictionary


def build_on_meta(module: nn.Module) -> list[nn.Module]:
    """Run the module's ``build()`` with parameters on the meta device. Buffers are made for real: they are small, and
    nothing could fill them again.

    Returns:
        The layers that own the new parameters, in the order of ``module.modules()``; empty where build() makes none.
    """
    with parameters_on_meta({id(parameter) for parameter in module.parameters()}):
        module.build()  # type: ignore[operator]
    return [layer for layer in module.modules() if has_meta(layer)]


def has_meta(layer: nn.Module) -> bool:
    """Whether a layer owns parameters without memory."""
    return any(p.is_meta for p in layer.parameters(recurse=False))


@contextmanager
def parameters_on_meta(kept: set[int]) -> Iterator[None]:
    """Every parameter that is registered in here loses its values and keeps its shape and its ties.

    Args:
        kept: ids of parameters that were there before, which a layer made in here may share.
    """
    register = nn.Module.register_parameter
    on_meta = WeakTensorKeyDictionary()  # the meta parameter that stands for one with memory

    def register_on_meta(layer: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(layer, name, parameter)
        if parameter is None or parameter.is_meta or id(parameter) in kept:
            return
        if parameter not in on_meta:
            on_meta[parameter] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        layer._parameters[name] = on_meta[parameter]

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def materialize(module: nn.Module, layers: list[nn.Module], device: torch.device) -> None:
    """Give meta parameters memory and initial values.

    Each layer is made whole on every rank for a moment, initialised by ``module.init_weights(layer)``, and cut to this
    rank's shards. Its random numbers follow from its name, so the values are the same under every sharding and order.

    Args:
        module: the user's module, placed.
        layers: what ``build_on_meta`` returned.
        device: of this rank's shards.
    """
    if not layers:
        return
    names = {id(layer): name for name, layer in module.named_modules()}
    filled: dict[int, nn.Parameter] = {}  # a tied parameter is filled where it is first met
    for layer in layers:
        placed = {name: p for name, p in layer._parameters.items() if p is not None}
        for name, parameter in placed.items():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            layer._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(torch.initial_seed() + zlib.crc32(names[id(layer)].encode()))
            module.init_weights(layer)  # type: ignore[operator]
        for name, parameter in placed.items():
            initial = layer._parameters[name]
            assert initial is not None
            if not parameter.is_meta:  # shared with a layer that was there before, it has its values
                filled[id(parameter)] = parameter
            elif id(parameter) not in filled:
                filled[id(parameter)] = nn.Parameter(like(parameter, initial), requires_grad=parameter.requires_grad)
            layer._parameters[name] = filled[id(parameter)]


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Cut a whole tensor as a parameter is cut."""
    if isinstance(parameter, DTensor):
        cut = distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements)
        local = parameter.to_local()
        if type(local) is Tensor:
            return cut
        # Shards of a class of their own, which say how they are gathered.
        return torch.empty_like(parameter, device=whole.device).copy_(cut)
    return whole.detach()
