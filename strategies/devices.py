"""The device that a process computes on, and moving batches there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def default_device() -> torch.device:
    """The accelerator this machine has, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


def move_to(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; copies from page-locked memory overlap with computation."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move_to(value, device) for value in batch)
    return batch
