"""The device that a process computes on, and moving batches there."""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from .batches import map_batch
from .copies_ahead import copies_ahead


def default_device() -> torch.device:
    """The accelerator this machine has, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)


def move_to(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``. A CUDA device copies from page-locked memory while it computes.

    An object that moves itself is copied first (``copy.copy``): many change themselves, and a dataset may keep them.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        own = copy.copy(value)
        result = own.to(device, non_blocking=True) if moves_non_blocking(value.__class__) else own.to(device)
        return own if result is None else result

    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return map_batch(moved, batch)
    return copies_ahead(device).move(batch, moved)


@functools.cache
def moves_non_blocking(kind: type) -> bool:
    """Whether the method ``to`` of a class takes ``non_blocking``."""
    try:
        parameters = inspect.signature(kind.to).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False
    return "non_blocking" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
