"""The 2-norm of gradients that are spread over meshes of several kinds, and clipping by it."""

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .local_parts import local_part
from .updating import norms


@torch.no_grad()  # without no_grad, to_local() would record itself for autograd
def clip_by_norm(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    groups: tuple[dist.ProcessGroup, ...] = (),
    whole: Collection[nn.Parameter] = (),
) -> tuple[Tensor, list[nn.Parameter], list[Tensor]]:
    """Scale gradients in place so that their common 2-norm is at most ``max_norm``.

    Each rank sums the squares of its own shards; a sum is then reduced over the mesh dimensions that shard, and over no
    dimension that replicates, so that nothing counts twice. One reduction for each kind of sharding, none for the rest.
    A number that isn't finite on one rank makes the norm infinite or NaN on all: what is reduced over fewer ranks is
    added, times 0, to what is reduced over more.

    Args:
        parameters: with plain or DTensor gradients, or none.
        max_norm: in the units of the gradient.
        groups: ranks that hold shards of the *plain* gradients (FSDP1's flat ones).
        whole: parameters whose gradients are whole, and equal on all ranks, all the same.

    Returns:
        The norm before clipping, 0-dim on the gradients' device, equal on all ranks; and this rank's gradients by
        themselves: their parameters, and the norms.
    """
    by_sharding: dict[tuple[dist.ProcessGroup, ...], list[nn.Parameter]] = defaultdict(list)
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
            by_sharding[tuple(mesh.get_group(d) for d in sharding)].append(parameter)
        else:
            by_sharding[() if id(parameter) in whole_ids else groups].append(parameter)
    squares: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    normed: list[nn.Parameter] = []
    each: list[Tensor] = []
    for sharded_over in sorted(by_sharding, key=len):
        held = by_sharding[sharded_over]
        if held:
            normed += held
            each += norms([local_part(parameter.grad) for parameter in held])
            square = torch.stack(each[-len(held) :]).square().sum()
        else:
            dtype = torch.promote_types(parameters[0].dtype, torch.float32)
            square = torch.zeros((), dtype=dtype, device=parameters[0].device)
        for over_fewer, reduced in squares.items():
            if len(over_fewer) < len(sharded_over):
                square = square + 0.0 * reduced
        for group in sharded_over:
            if dist.get_world_size(group) > 1:
                dist.all_reduce(square, group=group)
        squares[sharded_over] = square
    if not squares:
        return torch.zeros(()), [], []
    norm = torch.stack([squares[sharded_over] for sharded_over in by_sharding]).sum().sqrt()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # the formula of torch.nn.utils.clip_grad_norm_
    for held in filter(None, by_sharding.values()):
        torch._foreach_mul_([local_part(parameter.grad) for parameter in held], scale)
    return norm, normed, each


def cuts_tensor(placement: object) -> bool:
    """Whether a DTensor placement cuts the tensor."""
    return isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard"
