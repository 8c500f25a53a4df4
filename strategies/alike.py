"""All ranks begin from one model: what was made before ``build`` has rank 0's values everywhere."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..precision.quantized import scales

BUCKET = 2**25  # bytes in a message; small tensors share one, and large ones are sent in pieces


def move_module(module: nn.Module, device: torch.device, plain_stay: bool = False) -> None:
    """Move parameters and buffers that have memory to a device; late layers get theirs when they are filled.

    Args:
        module: the user's.
        device: of this rank.
        plain_stay: leave ordinary parameters where they are, for a strategy that moves each when it shards it.
    """
    plain = [p for p in module.parameters() if plain_stay and type(p) is nn.Parameter]
    staying = {id(tensor) for p in plain for tensor in (p, p.grad)}

    def move(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta or id(tensor) in staying else tensor.to(device)

    apply: Callable[..., nn.Module] = module._apply  # nn.Module.to itself is made of it
    apply(move)


@torch.no_grad()
def broadcast_module(module: nn.Module, device: torch.device) -> None:
    """Broadcast rank 0's parameters and buffers to every rank. Those without memory yet are left out.

    Args:
        module: on the device, or on the host: then it passes through the device, a bucket at a time.
        device: that the ranks' messages come from.
    """
    if dist.get_world_size() == 1:
        return
    bucket: list[Tensor] = []
    for piece in pieces_of(module, device):
        if bucket and sum(map(len, bucket)) + len(piece) > BUCKET:
            broadcast_bucket(bucket, device)
            bucket = []
        bucket.append(piece)
    if bucket:
        broadcast_bucket(bucket, device)
    broadcast_scales(module)


def pieces_of(module: nn.Module, device: torch.device) -> Iterator[Tensor]:
    """The bytes of a module's tensors, in pieces that fit into a bucket. What has no bytes end to end (a class of its
    own, which knows how it is sent, or another order of memory) is broadcast at once instead.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        numbers = tensor.detach()
        if tensor.is_meta or tensor.numel() == 0:
            continue
        if type(numbers) is not Tensor:
            dist.broadcast(tensor, src=0)
        elif not numbers.is_contiguous():
            whole = numbers.to(device).contiguous()
            dist.broadcast(whole, src=0)
            numbers.copy_(whole)
        else:
            yield from numbers.view(-1).view(torch.uint8).split(BUCKET)


def broadcast_bucket(pieces: list[Tensor], device: torch.device) -> None:
    """Broadcast the bytes of some tensors in one message."""
    if len(pieces) == 1 and pieces[0].device == device:
        dist.broadcast(pieces[0], src=0)
        return
    together = torch.cat(pieces).to(device)
    dist.broadcast(together, src=0)
    for piece, received in zip(pieces, together.split([len(piece) for piece in pieces]), strict=True):
        piece.copy_(received)


@torch.no_grad()
def broadcast_scales(module: nn.Module) -> None:
    """Broadcast rank 0's scales of quantized parameters to every rank: they are no buffers."""
    for tensor in scales(module):
        dist.broadcast(tensor, src=0)
