"""DDP as a played rank has it: buckets are sent by a hook, whose result torch's C++ can't take from a fake message."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..played import PlayedRank
from .replicas import Replicas


class PlayedDDP(PlayedRank):
    """Sends each bucket as DDP does, and is ready at once."""

    def register_hook(self, model: Replicas, dtype: torch.dtype | None) -> None:
        """Have buckets sent by a hook in any case."""
        model.register_comm_hook(dtype, sent_at_once)


def sent_at_once(dtype: torch.dtype | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Send a bucket of gradients in a dtype, or in its own, and be ready."""
    buffer = bucket.buffer()
    dist.all_reduce(buffer if dtype is None else buffer.to(dtype), async_op=True)
    ready: Any = torch.futures.Future()
    ready.set_result(buffer)
    return ready  # type: ignore[no-any-return]
