"""The 2-norm of gradients that are spread over meshes of several kinds, and clipping by it."""

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .base import norms


@torch.no_grad()  # without no_grad, to_local() would record itself for autograd
def clip_by_norm(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    groups: tuple[dist.ProcessGroup, ...] = (),
    whole: Collection[nn.Parameter] = (),
) -> Tensor:
    """Scale gradients in place so that their common 2-norm is at most ``max_norm``.

    Each rank sums the squares of its own shards; a sum is then reduced over the mesh dimensions that shard, and over no
    dimension that replicates, so that nothing counts twice. One reduction for each kind of sharding, none for the rest.

    Args:
        parameters: with plain or DTensor gradients, or none.
        max_norm: in the units of the gradient.
        groups: ranks that hold shards of the *plain* gradients (FSDP1's flat ones).
        whole: parameters whose gradients are whole, and equal on all ranks, all the same.

    Returns:
        The norm before clipping, 0-dim on the gradients' device, equal on all ranks.
    """
    by_sharding: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    if groups:
        by_sharding[groups] = []  # a rank whose shards are all frozen takes part in the sum all the same
    whole_ids = {id(parameter) for parameter in whole}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            # Shard, and _StridedShard where two dimensions of the mesh cut one dimension of the tensor.
            sharding = [d for d, placement in enumerate(gradient.placements) if cuts_tensor(placement)]
            by_sharding[tuple(mesh.get_group(d) for d in sharding)].append(gradient.to_local())
        else:
            by_sharding[() if id(parameter) in whole_ids else groups].append(gradient)
    squares = []
    for sharded_over, gradients in by_sharding.items():
        if gradients:
            square = torch.stack(norms(gradients)).square().sum()
        else:
            dtype = torch.promote_types(parameters[0].dtype, torch.float32)
            square = torch.zeros((), dtype=dtype, device=parameters[0].device)
        for group in sharded_over:
            if dist.get_world_size(group) > 1:
                dist.all_reduce(square, group=group)
        squares.append(square)
    if not squares:
        return torch.zeros(())
    norm = torch.stack(squares).sum().sqrt()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # the formula of torch.nn.utils.clip_grad_norm_
    for gradients in filter(None, by_sharding.values()):
        torch._foreach_mul_(gradients, scale)
    return norm


def cuts_tensor(placement: object) -> bool:
    """Whether a DTensor placement cuts the tensor."""
    return isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard"
