"""Microscaled float8 products by torchao's prototype: a scale for each 32 numbers."""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import MaxReduce, ShapesOnRank
from .fp8 import require_torchao
from .linear_layers import HEADS, put_in_place, qualifying
from .mixed import BF16Mixed

MULTIPLE = 32  # numbers that share a scale


class MXFP8(BF16Mixed):
    """``precision="mxfp8"``, experimental: MXFP8 products in nn.Linear layers, bfloat16 elsewhere.

    Forward and the gradients of inputs are computed in MXFP8, the gradients of weights in bfloat16: those sum over
    positions, and a micro-batch need not hold a multiple of 32. Parameters and checkpoints are those of "bf16-mixed".
    (Rouhani et al., 2023.)

    Args:
        emulate: round to MXFP8 and multiply in wider numbers. Slow; for machines without its units.
        skip: patterns of layer names to leave in bfloat16. Layers whose sizes aren't multiples of 32 stay there too.

    Raises:
        ValueError: the machine has no MXFP8 units (they came with NVIDIA's Blackwell), or torchao is missing.

    Example:
        ``Fit(module, data, precision=MXFP8(emulate=True))``
    """

    name = "mxfp8"
    computes_by_itself = True

    def __init__(self, emulate: bool = False, skip: Sequence[str] = HEADS) -> None:
        if isinstance(skip, str):
            raise TypeError(f"MXFP8(skip=...) takes several patterns; write skip=({skip!r},)")
        has_units = (
            torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0) and not torch.version.hip
        )
        if not (has_units or emulate):
            raise ValueError(
                "precision='mxfp8' needs MXFP8 units (NVIDIA GPUs of compute capability 10.0 or above), and this "
                "machine has none. Write precision=MXFP8(emulate=True) to have its rounding without its speed, or use "
                "precision='fp8' or 'bf16-mixed'."
            )
        require_torchao(self.name)
        warnings.warn(
            "precision='mxfp8' is experimental: it is a prototype of torchao (torchao.prototype), which may change or "
            "go with any release. precision='fp8' is its supported neighbour.",
            stacklevel=2,
        )
        self.emulate, self.skip = emulate, tuple(skip)

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Check that the run's own device, of perhaps several kinds, has the units."""
        super().set_up(device, max_over_ranks)
        if device.type != "cuda" and not self.emulate:
            raise ValueError(
                f"precision='mxfp8' needs MXFP8 units, and this run's device is {device}. Run on the GPU, or write "
                "precision=MXFP8(emulate=True)."
            )

    def replace_layers(self, module: nn.Module, shapes: ShapesOnRank) -> None:
        """Put an MXFP8Linear in the place of every nn.Linear that qualifies; parameters stay what they are."""
        from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.quantization.quantize_.common import KernelPreference

        product = functools.partial(
            _to_mxfp8_then_scaled_mm,
            kernel_preference=KernelPreference.EMULATED if self.emulate else KernelPreference.AUTO,
            scale_calculation_mode=ScaleCalculationMode.RCEIL,
            wgrad_with_hp=True,
        )
        for layer in qualifying(module, self.name, self.skip, MULTIPLE, shapes).values():
            put_in_place(module, layer, MXFP8Linear(layer, product))

    def __repr__(self) -> str:
        return f"MXFP8(emulate={self.emulate}, skip={self.skip})"


class MXFP8Linear(nn.Linear):
    """torchao's layer of that name, under autocast, too: its product takes an input and a weight of one dtype.

    Args:
        layer: whose parameters it takes.
        product: (input, weight) to output.
    """

    def __init__(self, layer: nn.Linear, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.product = product

    def forward(self, input: Tensor) -> Tensor:
        """Multiply as nn.Linear does, by the layer's product."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        output = self.product(input.to(dtype), self.weight.to(dtype))
        return output if self.bias is None else output + self.bias.to(dtype)
