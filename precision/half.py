"""True halves: parameters and arithmetic in 16 bits, updates in float32."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .base import MaxReduce, Precision
from .boundary import cast_at_the_border, cast_floats
from .full import cast_floating
from .loss_scaling import LossScaling
from .master_weights import on_master_weights, widen_gradients


class TrueHalf(Precision):
    """Parameters, activations and gradients in ``parameter_dtype``; master weights and moments in float32.

    Compared with mixed precision, weights and gradients are gathered, reduced and read in half the bytes, and nothing
    is cast in forward. Norms, softmax and reductions round to 16 bits, too. Floating-point buffers are cast with the
    parameters; complex ones and quantized weights stay.
    """

    parameter_dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    master_weights = True
    computes_by_itself = True
    # The default dtype stays the user's: under another, torch.arange(n) in a forward would count wrong beyond 256.

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Refuse a torch that can't keep float32 gradients beside 16-bit parameters."""
        super().set_up(device, max_over_ranks)
        if self.master_weights and not hasattr(torch.Tensor, "grad_dtype"):
            raise ValueError(
                f"precision={self.name!r} keeps float32 gradients beside 16-bit parameters, which torch "
                f"{torch.__version__} can't. Install torch 2.10 or newer, or use a mixed precision."
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast floating-point parameters and buffers; inputs are cast as they come, outputs are float32."""
        return cast_at_the_border(cast_floating(module, self.parameter_dtype), self.parameter_dtype)

    def cast_batch(self, batch: Any) -> Any:
        """Cast floating-point tensors as they are at the border."""
        return cast_floats(self.parameter_dtype, batch)

    def unscale(self, optimizer: Optimizer) -> None:
        """Widen the gradients to float32, from here to the end of the update."""
        if self.master_weights:
            widen_gradients(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        """Step on the master weights, and round them into the parameters."""
        if not self.master_weights:
            return super().step(optimizer)
        with on_master_weights(optimizer):
            super().step(optimizer)


class BF16True(TrueHalf):
    """``precision="bf16-true"``: bfloat16 has float32's range, so no loss scaling, but only 8 bits.

    An update smaller than 1/256 of its weight is rounded away: AdamW with a learning rate of 1e-3 never moves a weight
    of 1. Updates therefore accumulate in float32 master weights, at 4 bytes a parameter.

    Args:
        master_weights: False steps on the bfloat16 parameters themselves, with moments in bfloat16: a third of the
            memory, for optimizers that know how to round (torchao's ``_AdamW(bf16_stochastic_round=True)``), or for
            large updates. It warns.

    Example:
        ``Fit(module, data, precision="bf16-true")``
    """

    name = "bf16-true"
    parameter_dtype = torch.bfloat16
    compute_dtype = torch.bfloat16
    reduce_dtype = torch.bfloat16

    def __init__(self, master_weights: bool = True) -> None:
        self.master_weights = master_weights

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Warn where bfloat16 may round updates away."""
        super().set_up(device, max_over_ranks)
        if not self.master_weights:
            warnings.warn(
                "BF16True(master_weights=False): an update smaller than 1/256 of its weight is rounded away, unless "
                "the optimizer rounds stochastically. precision='bf16-true' keeps float32 master weights.",
                LostUpdates,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"BF16True({'' if self.master_weights else 'master_weights=False'})"


class LostUpdates(UserWarning):
    """Updates may be too small for the parameters' number format to hold."""


class FP16True(LossScaling, TrueHalf):
    """``precision="16-true"``: float16 throughout, with dynamic loss scaling.

    Always with float32 master weights and moments: in float16, AdamW's mean of squared gradients underflows to 0 for
    gradients below 2e-4, and the update divides by it. Gradients are float32 before they are divided by the scale.

    Args:
        initial_scale: first factor on the loss.
        growth_interval: updates without overflow before the scale doubles.

    Example:
        ``Fit(module, data, precision=FP16True(growth_interval=500))``
    """

    name = "16-true"
    parameter_dtype = torch.float16
    compute_dtype = torch.float16
    reduce_dtype = torch.float16

    def step(self, optimizer: Optimizer) -> None:
        """Step on the master weights unless a gradient overflowed, then adapt the scale."""
        with on_master_weights(optimizer):
            LossScaling.step(self, optimizer)
