"""64-bit parameters and arithmetic: for a loss that must not round, and for telling a bug from rounding."""

from typing import Any

import torch
from torch import nn

from .base import Precision
from .boundary import cast_at_the_border, cast_floats
from .full import cast_floating


class Double(Precision):
    """``precision="64-true"``: float64 parameters, compute and reductions. Twice the memory of float32; accelerators
    compute it at a fraction of their speed, or not at all.

    Example:
        ``Fit(module, data, precision="64-true")``
    """

    name = "64-true"
    parameter_dtype = torch.float64
    compute_dtype = torch.float64
    reduce_dtype = torch.float64

    def set_up(self, device: torch.device, max_over_ranks: object) -> None:
        """Refuse a device without float64."""
        if device.type == "mps":
            raise ValueError("precision='64-true': Apple's GPUs have no float64. Use precision='32-true'.")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast floating-point parameters and buffers to float64; floating-point inputs are cast as they come."""
        return cast_at_the_border(cast_floating(module, torch.float64), torch.float64)

    def cast_batch(self, batch: Any) -> Any:
        """Cast floating-point tensors as they are at the border."""
        return cast_floats(torch.float64, batch)
