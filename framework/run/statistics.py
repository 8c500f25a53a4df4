"""Running statistics of normalization layers, which an update that isn't made must leave as they were."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Keeps what forward changes in BatchNorm layers, and gives it back where the update isn't made.

    Args:
        live: the buffers.
        generations: updates that may be under way before it is known of the first whether it was made.
    """

    def __init__(self, live: Sequence[Tensor], generations: int) -> None:
        # Neighbours of one dtype are copied together.
        self.live = sorted(live, key=lambda buffer: str(buffer.dtype))
        self.kept = [[buffer.detach().clone() for buffer in self.live] for _ in range(generations)]
        self.updates = [0] * generations
        self.latest = 0

    @torch.no_grad()
    def keep(self, update: int) -> None:
        """Copy the buffers before an update of that number."""
        self.latest = (self.latest + 1) % len(self.kept)
        self.updates[self.latest] = update
        torch._foreach_copy_(self.kept[self.latest], self.live)

    @torch.no_grad()
    def give_back(self, update: int) -> None:
        """Set the buffers to what they were before an update; where the next forward has run since, that one's share is
        lost, too.
        """
        before = self.kept[self.updates.index(update)]
        torch._foreach_copy_(self.live, before)
        for number, later in zip(self.updates, self.kept, strict=True):
            if number > update:
                torch._foreach_copy_(later, before)


def running_statistics(module: nn.Module, generations: int) -> RunningStatistics | None:
    """Find the running statistics of a module; None where it has none.

    Args:
        module: placed.
        generations: see RunningStatistics.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    live = [buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None]
    return RunningStatistics(live, generations) if live else None
