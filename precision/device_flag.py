"""A yes or no that is computed on the device, and that the host learns of without waiting for later work."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class DeviceFlag:
    """Takes a flag to the host while the device goes on.

    Args:
        flag: 0-dim, 0 for no; nothing changes it any more.
    """

    def __init__(self, flag: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._flag = flag
        if flag.device.type == "cuda":
            self._flag = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def is_up(self) -> bool:
        """Whether the flag is up. Waits at most for the work that made it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag.to("cpu").numpy())  # by numpy, since that never waits for the device


def takes_flag(optimizer: Any) -> bool:
    """Whether an optimizer's step reads on the device whether to leave the parameters alone (``found_inf``).

    torch's fused SGD makes its momentum in the first step, and leaves it without values where that step is left out.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return not isinstance(optimizer, torch.optim.SGD) or len(optimizer.state) > 0 or not has_momentum(optimizer)


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether any group of an SGD optimizer has momentum."""
    return any(group["momentum"] for group in optimizer.param_groups)
