"""FSDP1 in mixed precision: which layers are flat shards of their own, so that each one is gathered in one dtype.

torch lays all parameters of a wrapped block end to end, in one dtype. Matrices of products are read in 16 bits, and
autocast wants the rest in float32: the fewer of the two kinds are wrapped apart, within their block.
"""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from ...precision.frozen import Frozen
from ...precision.products import MULTIPLYING, Slot, own_parameters
from ..frozen_units import has_own_format

WHOLE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""torch's own layers that read the parameters of layers inside them, which must therefore be whole when they do."""


def wrapped_layers(
    module: nn.Module, units: Mapping[nn.Module, Frozen | None], kept: set[Slot]
) -> Mapping[nn.Module, bool]:
    """The layers to wrap: the blocks, the module itself, and what stands apart in each; and whether in 16 bits.

    Args:
        module: the user's.
        units: its blocks, with the frozen part that each is in, or is. One with a format of its own isn't cast.
        kept: where the parameters stand that are gathered in float32.
    """
    blocks = set(units)
    places = Counter(id(parameter) for _, parameter in own_parameters(module))
    wrapped: dict[nn.Module, bool] = {}
    for block in (*blocks, module):
        if has_own_format(units.get(block)):
            wrapped[block] = False
            continue
        leaves: dict[bool, list[nn.Module]] = {True: [], False: []}  # in 16 bits, in float32
        rest: set[bool] = set()  # which of the two the block itself has
        for layer in inside(block, blocks):
            of_layer = whole(layer)
            kinds = {slot not in kept for slot, _ in of_layer}
            tied = any(places[id(parameter)] > 1 for _, parameter in of_layer)
            holds_others = not isinstance(layer, MULTIPLYING) and any(True for _ in layer.children())
            if layer is block or tied or len(kinds) != 1 or holds_others:
                rest |= kinds
            else:
                leaves[kinds.pop()].append(layer)
        if False in rest:
            narrow = False
        elif True in rest:
            narrow = True
        else:
            narrow = not leaves[False] or 0 < len(leaves[False]) <= len(leaves[True])
        wrapped[block] = narrow
        wrapped |= dict.fromkeys(leaves[not narrow], not narrow)
    return wrapped


def inside(layer: nn.Module, blocks: set[nn.Module]) -> list[nn.Module]:
    """A layer, and those in it that are in no other block and not taken as a whole with another."""
    if isinstance(layer, (*MULTIPLYING, *WHOLE)):
        return [layer]
    return [layer, *(found for child in layer.children() if child not in blocks for found in inside(child, blocks))]


def whole(layer: nn.Module) -> list[tuple[Slot, nn.Parameter]]:
    """The parameters that belong to a layer: its own, and those inside where it is taken as a whole."""
    owned = list(own_parameters(layer))
    taken = isinstance(layer, (*MULTIPLYING, *WHOLE))
    return owned if taken else [(slot, parameter) for slot, parameter in owned if slot[0] is layer]
