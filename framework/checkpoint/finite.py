"""The refusal to save weights, or an optimizer's state, that aren't finite: the finite ones that are there stay."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...precision.complex_numbers import as_real
from ...strategies.base import Strategy
from ..agreement import on_all_ranks
from .directory import CheckpointError

NAMED = 5  # tensors that the error names
ONE_BY_ONE = 1 << 13  # numbers in a tensor, beyond


def check_finite(strategy: Strategy, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Refuse trainable parameters and optimizer states that hold an inf or NaN. Buffers and frozen parameters may hold
    one on purpose, as masks do. Collective: one read of the device, and one exchange.

    Args:
        strategy: knows what is trainable.
        model: parameters and buffers by name, as they are sharded.
        optimizer: "<parameter>/<state key>" to tensor.

    Raises:
        CheckpointError: on every rank; names the tensors, and the first rank that holds such numbers.
    """
    trainable = {name for name, p in strategy.named_parameters(remove_duplicate=False).items() if p.requires_grad}
    tensors = {name: tensor for name, tensor in model.items() if name in trainable} | dict(optimizer)

    def check() -> None:
        found = nonfinite_tensors(tensors)
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise CheckpointError(
                f"{', '.join(map(repr, found[:NAMED]))}{more} hold numbers that aren't finite (inf or NaN), so this "
                "isn't saved; what was saved before stays. Go on from there with a lower learning_rate, and with "
                "debug='underflow_overflow' to see where it begins."
            )

    on_all_ranks(strategy, check, CheckpointError)


@torch.no_grad()
def nonfinite_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors of which this rank holds numbers that aren't finite. Waits for the device once for each kind
    of tensor.
    """
    kinds: dict[tuple[torch.device, torch.dtype, bool], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        local = as_real(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        if local.is_floating_point() and local.dtype.itemsize > 1 and local.numel():
            # On the host, the kernel for norms takes ten times as long for each number, and half as long for a tensor.
            one_by_one = local.device.type == "cpu" and local.numel() > ONE_BY_ONE
            kinds.setdefault((local.device, local.dtype, one_by_one), {})[name] = local
    found = set()
    for (_, _, one_by_one), alike in kinds.items():
        if one_by_one:
            lowest, highest = zip(*map(torch.aminmax, alike.values()), strict=True)
            finite = (torch.stack(lowest).isfinite() & torch.stack(highest).isfinite()).tolist()
        else:
            finite = torch.stack(torch._foreach_norm(list(alike.values()), torch.inf)).isfinite().tolist()
        found |= {name for name, is_finite in zip(alike, finite, strict=True) if not is_finite}
    return [name for name in tensors if name in found]
