"""The factor that clips gradients, computed on the host: the number that torch's own formula comes to, to the bit."""

import math
import struct

import torch
from torch import Tensor

SINGLE = struct.Struct("f")
LARGEST = torch.finfo(torch.float32).max


def clip_factor(norm: Tensor, max_norm: float) -> float:
    """Compute ``(max_norm / (norm + 1e-6)).clamp(max=1.0)``, the factor of torch.nn.utils.clip_grad_norm_, without
    tensors: their operators take longer than all else that is done for the norm of a small model.

    Args:
        norm: 0-dim, float32 or float64, on the CPU.
        max_norm: above 0.

    Returns:
        The factor; NaN where the norm is.

    Example:
        >>> clip_factor(torch.tensor(0.5), 1.0), clip_factor(torch.tensor(4.0, dtype=torch.float64), 1.0)
        (1.0, 0.24999993750001562)
    """
    value = norm.item()
    if norm.dtype == torch.float64:
        factor = 1.0 / (value + 1e-6) * max_norm
    else:
        # One operation in float64, rounded to float32, is that operation in float32 (Figueroa, 1995).
        inverse = as_single(1.0 / as_single(value + as_single(1e-6)))
        factor = inverse * (as_single(max_norm) if max_norm < LARGEST else math.inf)
        if factor < 1.0:
            factor = as_single(factor)
    return 1.0 if factor > 1.0 else factor


def as_single(value: float) -> float:
    """Round a number to float32."""
    return SINGLE.unpack(SINGLE.pack(value))[0]  # type: ignore[no-any-return]
