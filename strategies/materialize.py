"""Late layers: built without memory, sharded, and then filled layer by layer, so that no rank holds the whole model."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .held_parts import cut_like, from_local, held_parts, local_shape
from .recording import StandIn, loops_recorded
from .tiles import do


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

    A parameter whose values ``module.initial_values`` gives takes this rank's parts of them. The others of its layer
    are filled by ``module.init_weights(layer)``, whose random numbers follow from the seed, names and places alone, so
    the values are the same under every strategy. A rank computes its own parts of them, but for a layer whose
    ``init_weights`` does what can't be done on a part (an orthogonal matrix, values that are read): that one is made
    whole for a moment on every rank, and cut.

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
        placed = {key: p for key, p in layer._parameters.items() if p is not None}
        prefix = f"{names[id(layer)]}." if names[id(layer)] else ""
        for key, parameter in placed.items():
            if not parameter.is_meta:  # shared with a layer that was there before, it has its values
                filled[id(parameter)] = parameter
            elif id(parameter) not in filled:
                values = given_values(module, prefix + key, parameter, device)
                if values is not None:
                    filled[id(parameter)] = like(parameter, values)
        if any(id(parameter) not in filled for parameter in placed.values()):
            missing = {key: p for key, p in placed.items() if id(p) not in filled}
            for key, values in initialised(module, layer, prefix, missing, device):
                filled[id(placed[key])] = like(placed[key], values)
        for key, parameter in placed.items():
            layer._parameters[key] = filled[id(parameter)]


def like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Make a parameter of this rank's values that takes gradients where ``parameter`` does, and is placed as it is."""
    placed = from_local(values, parameter) if isinstance(parameter, DTensor) else values
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)


def initialised(
    module: nn.Module, layer: nn.Module, prefix: str, missing: dict[str, nn.Parameter], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Have ``init_weights`` fill a layer, and yield this rank's values of its parameters, one at a time.

    Args:
        module: the user's.
        layer: of it, whose parameters are exchanged.
        prefix: of the parameters' names.
        missing: the parameters that are needed; others keep the values that they have.
        device: of the values.
    """
    given = {key: parameter for key, parameter in layer._parameters.items() if parameter is not None}
    stand_ins = {key: StandIn(parameter, device) for key, parameter in given.items()}
    recorded = {key: nn.Parameter(stand_ins[key], requires_grad=p.requires_grad) for key, p in given.items()}
    layer._parameters.update(recorded)
    try:
        with loops_recorded():
            call_init_weights(module, layer, prefix, device)
        by_parts = all(layer._parameters.get(key) is parameter for key, parameter in recorded.items())
    except Exception:  # whatever it is that a stand-in can't do; what is wrong with init_weights itself is met again
        by_parts = False
    if by_parts:
        for key, parameter in missing.items():
            parts = held_parts(parameter)
            yield key, do(stand_ins[key].operations, parts, parameter, prefix + key, device)
        return
    for key, parameter in given.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        layer._parameters[key] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    call_init_weights(module, layer, prefix, device)
    for key, parameter in missing.items():
        initial = layer._parameters[key]
        assert initial is not None
        yield key, cut_like(initial, parameter)


def call_init_weights(module: nn.Module, layer: nn.Module, prefix: str, device: torch.device) -> None:
    """Call the user's ``init_weights`` with random numbers that follow from the seed and the layer's name."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed() + zlib.crc32(prefix.rstrip(".").encode()))
        module.init_weights(layer)  # type: ignore[operator]


def given_values(module: nn.Module, name: str, parameter: Tensor, device: torch.device) -> Tensor | None:
    """This rank's values of a late parameter, as ``module.initial_values`` gives them; None where it gives none.

    Args:
        module: the user's.
        name: of the parameter.
        parameter: placed, without memory.
        device: of the values.

    Raises:
        ValueError: what was given isn't of the part's shape.
    """
    parts = held_parts(parameter)
    local = None
    for part in parts:
        values = module.initial_values(name, part.whole)  # type: ignore[operator]
        if values is None:
            return None
        shape = tuple(piece.stop - piece.start for piece in part.whole)
        if tuple(values.shape) != shape:
            raise ValueError(
                f"{type(module).__name__}.initial_values({name!r}, {part.whole}) returned a tensor of shape "
                f"{tuple(values.shape)}. Return that part of the parameter alone: {shape}."
            )
        if local is None:
            local = torch.empty(local_shape(parts), dtype=parameter.dtype, device=device)
        local[part.local].copy_(values)
    assert local is not None, "a shard has at least one part"
    return local
