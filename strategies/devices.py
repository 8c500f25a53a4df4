"""The device that a process computes on, and moving batches there."""

import copy
import functools
import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .batches import map_batch


def default_device() -> torch.device:
    """The accelerator this machine has, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


def move_to(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; copies from page-locked memory overlap with computation.

    An object that moves itself is copied first (``copy.copy``): many change themselves, and a dataset may keep them.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        own = copy.copy(value)
        kind: Hashable = type(value)  # type: ignore[assignment]
        result = own.to(device, non_blocking=True) if moves_non_blocking(kind) else own.to(device)
        return own if result is None else result

    return map_batch(moved, batch)


@functools.cache
def moves_non_blocking(kind: Hashable) -> bool:
    """Whether the method ``to`` of a class takes ``non_blocking``."""
    try:
        parameters = inspect.signature(kind.to).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False
    return "non_blocking" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
