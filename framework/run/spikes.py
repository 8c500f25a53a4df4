"""The rule by which an update is refused whose gradients' norm is far above those before it."""

import math
from typing import Any

import torch
from torch import Tensor

WARM_UP = 50  # norms that are seen before any is refused
MEMORY = 100  # norms after which the oldest are forgotten


class SpikeRule:
    """Compares each norm with the running mean and standard deviation of those before it.

    The mean and the variance are those of all norms of updates that were made, as long as they are no more than 100.
    From there on a new norm has a weight of 1/100 in both, so that older ones fade. With n norms before it, a norm x
    has the weight w = max(1 / (n + 1), 1 / 100), and::

        variance <- (1 - w) * (variance + w * (x - mean)^2)
        mean     <- mean + w * (x - mean)

    Where 50 norms are known, one above ``mean + threshold * sqrt(variance)`` is a spike, and doesn't count.

    Args:
        threshold: standard deviations.

    Attributes:
        count, mean, variance: of the norms so far.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def refuses(self, norm: float) -> bool:
        """Whether a norm is a spike; else it is counted. One that isn't finite is neither."""
        if not math.isfinite(norm):
            return False
        away = norm - self.mean
        if self.count >= WARM_UP and away > self.threshold * math.sqrt(self.variance):
            return True
        weight = max(1.0 / (self.count + 1), 1.0 / MEMORY)
        self.variance = (1.0 - weight) * (self.variance + weight * away * away)
        self.mean += weight * away
        self.count += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the running values as JSON types."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]

    def describe(self) -> str:
        """Say what a spike is above."""
        return (
            f"{self.threshold:g} standard deviations of {math.sqrt(self.variance):.4g} above a mean of {self.mean:.4g}"
        )


class DeviceSpikeRule(SpikeRule):
    """The same rule, computed where the norms are, so that the host waits for none.

    Args:
        threshold: standard deviations.
        device: of the norms.
    """

    def __init__(self, threshold: float, device: torch.device) -> None:
        super().__init__(threshold)
        # Apple's GPUs have no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.numbers = torch.zeros(3, dtype=self.dtype, device=device)  # count, mean, variance

    @torch.no_grad()
    def flag(self, norm: Tensor) -> Tensor:
        """Return 1 where a norm is a spike and else 0, 0-dim in float32; a finite one that is no spike is counted."""
        count, mean, variance = self.numbers.unbind()
        away = norm.to(self.dtype) - mean
        finite = away.isfinite()
        spike = (count >= WARM_UP) & (away > self.threshold * variance.sqrt()) & finite
        weight = (1.0 / (count + 1.0)).clamp(min=1.0 / MEMORY)
        counted = torch.stack([count + 1.0, mean + weight * away, (1.0 - weight) * (variance + weight * away * away)])
        self.numbers = torch.where(finite & ~spike, counted, self.numbers)
        return spike.float()

    def state_dict(self) -> dict[str, Any]:
        """Read the running values, which waits for the device."""
        self.read()
        return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.numbers = torch.tensor(
            [self.count, self.mean, self.variance], dtype=self.dtype, device=self.numbers.device
        )

    def describe(self) -> str:
        """Say what a spike is above, by the values of now. Waits for the device."""
        self.read()
        return super().describe()

    def read(self) -> None:
        """Bring the running values to the host."""
        count, self.mean, self.variance = self.numbers.tolist()
        self.count = int(count)
