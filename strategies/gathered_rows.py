"""All data-parallel ranks' rows on each rank, with gradients that go back to the rank that computed them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..precision.second_gradients import check_first_gradient
from .ranks import padded, with_mask

# torch 2.13 has given them other names.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class AllRows(torch.autograd.Function):
    """All-gathers equally many rows of each rank; the gradients of all ranks' losses are summed in backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Gather ``rows``, (rows, ...), to (ranks, rows, ...)."""
        ctx.group = group
        rows = rows.contiguous()
        gathered = rows.new_empty((group.size() * len(rows), *rows.shape[1:]))
        all_gather(gathered, rows, group=group)
        return gathered.view(group.size(), *rows.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Sum what each rank's loss says of this rank's rows."""
        check_first_gradient("rows that gather() brings from other ranks have", "Compute the penalty without them.")
        [gradient] = gradients
        own = gradient.new_empty(gradient.shape[1:])
        reduce_scatter(own, gradient.reshape(-1, *gradient.shape[2:]).contiguous(), group=ctx.group)
        return own, None


def all_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather equally many rows of each rank, (rows, ...), to (ranks, rows, ...)."""
    gathered: Tensor = AllRows.apply(rows, group)  # type: ignore[no-untyped-call]
    return gathered


def gather_rows(rows: Tensor, group: dist.ProcessGroup, contributes: bool) -> Tensor:
    """Put the rows of all ranks of a group below one another, this rank's own first and then those of the others in the
    order of ranks. Collective, in backward too; the host waits for the others' numbers of rows.

    Args:
        rows: (own rows, ...); the other dimensions are the same on all ranks.
        group: of all ranks with different samples.
        contributes: whether the others are given this rank's rows.
    """
    own = len(rows) if contributes else 0
    counts = torch.empty(group.size(), dtype=torch.int64)
    all_gather(counts, torch.tensor([own]), group=group)
    numbers = counts.tolist()
    everyones = all_rows(padded(rows[:own], max(numbers)), group)
    here = group.rank()
    return torch.cat([rows, *(everyones[rank, :n] for rank, n in enumerate(numbers) if rank != here)])


def gather_padded(rows: Tensor, size: int, group: dist.ProcessGroup, contributes: bool) -> tuple[Tensor, Tensor]:
    """Do as ``gather_rows`` with each rank's rows filled up to ``size`` by zeros. Nothing waits.

    Returns:
        (rows, mask): (ranks * size, ...), this rank's own first; and which of them are rows, (ranks * size,).
    """
    filled, own = with_mask(rows, size)
    everyones = all_rows(filled if contributes else filled * 0, group)
    masks = all_rows((own if contributes else torch.zeros_like(own)).to(torch.uint8), group).bool()
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    return torch.cat([filled, *(everyones[rank] for rank in others)]), torch.cat([own, *(masks[r] for r in others)])
