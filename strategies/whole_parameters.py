"""Parameters that a sharding strategy keeps whole on every rank, since they can't be cut."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..precision.complex_numbers import as_real

Kept = Callable[[nn.Parameter], bool]


def is_indivisible(parameter: nn.Parameter) -> bool:
    """Whether a parameter has nothing to cut (no dimensions, or no numbers), or is complex, which flat shards of real
    numbers can't hold.
    """
    return parameter.ndim == 0 or parameter.numel() == 0 or parameter.is_complex()


def is_indivisible_or_integer(parameter: nn.Parameter) -> bool:
    """Whether a parameter is indivisible, or holds integers or bools, which can't lie end to end with floats."""
    return is_indivisible(parameter) or not parameter.is_floating_point()


def whole_parameters(module: nn.Module, kept: Kept = is_indivisible) -> list[nn.Parameter]:
    """The module's parameters that stay whole, in its order. Every rank finds the same ones, before others are cut flat
    and before or after they become DTensors.
    """
    return [parameter for parameter in module.parameters() if kept(parameter)]


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Replace the gradients of whole parameters by their means over the ranks, in one reduction for each dtype.

    A rank whose backward didn't reach a parameter counts with a gradient of 0, and so does one that no rank reached.

    Args:
        parameters: the same on every rank.
        group: ranks with different samples or positions.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        numbers = as_real(gradient)
        by_kind[numbers.dtype, numbers.device].append(numbers)
    for gradients in by_kind.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=group)
        parts = flat.div_(size).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))
