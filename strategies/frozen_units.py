"""Frozen parts of a module under strategies that shard: each is gathered for its own forward alone."""

from collections.abc import Sequence

from torch import nn

from ..precision.frozen import Frozen, frozen_parts, parts_by_layer


def units_to_gather(module: nn.Module, blocks: Sequence[nn.Module]) -> dict[nn.Module, Frozen | None]:
    """Find what is gathered by itself: the blocks, and the frozen parts that are in no block, or have a number format
    that its other parameters don't have.

    Args:
        module: the user's.
        blocks: those of ``shard_units()``.

    Returns:
        Each, what is inside of another first, with the frozen part that it is in, if it is in one.
    """
    frozen = parts_by_layer(module)
    in_blocks = {layer for block in blocks for layer in block.modules()}
    units = {block: frozen.get(block) for block in blocks}
    for mark in frozen_parts(module).values():
        part = mark.module
        if part is not module and (part not in in_blocks or mark.format is not None):
            units[part] = mark
    depth = {layer: name.count(".") for name, layer in module.named_modules()}
    return dict(sorted(units.items(), key=lambda unit: -depth[unit[0]]))


def makes_no_graph(mark: Frozen | None) -> bool:
    """Whether no backward follows the forward of a unit that is in this frozen part."""
    return mark is not None and not mark.input_gradients


def has_own_format(mark: Frozen | None) -> bool:
    """Whether a unit that is in this frozen part is gathered as it is, whatever the run's precision casts."""
    return mark is not None and mark.format is not None
