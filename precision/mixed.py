"""Mixed precision: float32 parameters, 16-bit matrix products under torch.autocast."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .base import MaxReduce, Precision
from .full import cast_floating
from .loss_scaling import LossScaling


class Mixed(Precision):
    """Float32 parameters and reductions, matrix products in ``compute_dtype`` (Micikevicius et al., 2018)."""

    parameter_dtype = torch.float32
    compute_dtype: torch.dtype
    reduce_dtype = torch.float32

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Remember the device that autocast is for."""
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast floating-point parameters and buffers to float32, whatever the user built them in."""
        return cast_floating(module, torch.float32)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Make torch.autocast's context, in the compute dtype on the run's device."""
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


class BF16Mixed(Mixed):
    """``precision="bf16-mixed"``: bfloat16 has float32's range, so no loss scaling."""

    name = "bf16-mixed"
    compute_dtype = torch.bfloat16


class FP16Mixed(LossScaling, Mixed):
    """``precision="16-mixed"``: float16 products with dynamic loss scaling.

    Args:
        initial_scale: first factor on the loss.
        growth_interval: updates without overflow before the scale doubles.

    Example:
        ``Fit(module, data, precision=FP16Mixed(growth_interval=500))``
    """

    name = "16-mixed"
    compute_dtype = torch.float16
