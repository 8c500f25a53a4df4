"""8-bit floating-point matrix products by torchao, with float32 parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .base import MaxReduce, ShapesOnRank
from .linear_layers import HEADS, put_in_place, qualifying, tied_weights
from .mixed import BF16Mixed

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
MULTIPLE = 16  # the hardware multiplies sizes that are multiples of it (torch._scaled_mm)


class FP8(BF16Mixed):
    """``precision="fp8"``: float8 products in nn.Linear layers, bfloat16 ones elsewhere (Micikevicius et al., 2022).

    Inputs, weights and output gradients are scaled to float8's range as they come and rounded; parameters, gradients,
    optimizer state and checkpoints are float32, under their plain names. On GPUs it pays with torch_compile=True: the
    scaling is fused with what surrounds it. The positions of a micro-batch (samples times length) must be a multiple of
    16 there, or ``pad`` be given.

    Args:
        recipe: "tensorwise", one scale for a tensor, is the fastest; "rowwise", one for each row, is more exact;
            "rowwise_with_gw_hp" also computes the gradients of weights in bfloat16.
        emulate: round to float8 and multiply in wider numbers. Slow; for machines without float8 units.
        skip: patterns of layer names to leave in bfloat16. Layers whose sizes, on their rank, aren't multiples of 16
            stay there in any case.
        all_gather: FSDP2 gathers weights in float8, for a quarter of the traffic of float32 (half of bfloat16's); their
            scales are computed once an update. With "tensorwise" only. Tied weights are gathered as ever.
        pad: pad micro-batches to multiples of 16 positions inside each product; costs copies.

    Raises:
        ValueError: the machine has no float8 units, torchao is missing, or options don't go together.

    Example:
        ``Fit(module, data, strategy="fsdp2", precision=FP8(recipe="rowwise", skip=("*head", "*.gate")))``
    """

    name = "fp8"
    computes_by_itself = True

    def __init__(
        self,
        recipe: str = "tensorwise",
        emulate: bool = False,
        skip: Sequence[str] = HEADS,
        all_gather: bool = False,
        pad: bool = False,
    ) -> None:
        if recipe not in RECIPES:
            raise ValueError(f"FP8(recipe=...) takes {', '.join(map(repr, RECIPES))}. Received: {recipe!r}")
        if isinstance(skip, str):
            raise TypeError(f"FP8(skip=...) takes several patterns; write skip=({skip!r},)")
        if all_gather and recipe != "tensorwise":
            raise ValueError(
                f"FP8(recipe={recipe!r}, all_gather=True): a weight that is gathered in float8 has one scale, and this "
                "recipe gives each row its own. Use recipe='tensorwise', or leave all_gather out."
            )
        lacks = machine_lacks()
        if lacks and not emulate:
            raise ValueError(
                f"precision='fp8' needs float8 units, and {lacks}. Write precision=FP8(emulate=True) to have float8's "
                "rounding without its speed, or use precision='bf16-mixed'."
            )
        require_torchao(self.name)
        self.recipe, self.emulate, self.skip = recipe, emulate, tuple(skip)
        self.all_gather, self.pad = all_gather, pad

    @property
    def refused_parameters(self) -> Mapping[str, str]:  # type: ignore[override]
        """What FSDP2 alone can gather in float8; nothing without ``all_gather``."""
        if not self.all_gather:
            return {}
        gathers = "FP8(all_gather=True) is about how FSDP2 gathers its shards; "
        return {
            "whole": gathers + "this strategy has none. Leave all_gather out, or use strategy='fsdp2'.",
            "flat": gathers + "FSDP1's shards are flat pieces. Use strategy='fsdp2', or leave all_gather out.",
            "tensor_parallel": "FP8(all_gather=True) can't scale weights that tensor parallelism cuts, too. Leave "
            "all_gather out, or tensor_parallel.",
        }

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Check that the run's own device, of perhaps several kinds, has float8 units."""
        super().set_up(device, max_over_ranks)
        if device.type != "cuda" and not self.emulate:
            raise ValueError(
                f"precision='fp8' needs float8 units, and this run's device is {device}. Run on the GPU, or write "
                "precision=FP8(emulate=True)."
            )

    def replace_layers(self, module: nn.Module, shapes: ShapesOnRank) -> None:
        """Put torchao's Float8Linear in the place of every nn.Linear that qualifies."""
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = dataclasses.replace(
            Float8LinearConfig.from_recipe_name(self.recipe),
            emulate=self.emulate,
            pad_inner_dim=self.pad,
            enable_fsdp_float8_all_gather=self.all_gather,
        )
        # A weight that is gathered in float8 becomes another parameter, which its other layers would not share.
        tied = tied_weights(module)
        plain = dataclasses.replace(config, enable_fsdp_float8_all_gather=False)
        for layer in qualifying(module, self.name, self.skip, MULTIPLE, shapes).values():
            # torchao converts what is inside of a module; layers that stand at several places shall remain one.
            holder = nn.Sequential(layer)
            convert_to_float8_training(holder, config=plain if id(layer.weight) in tied else config)
            put_in_place(module, layer, holder[0])
            if self.device.type == "cpu":
                holder[0].register_forward_pre_hook(autocast_input)

    def weights_have_changed(self, module: nn.Module) -> None:
        """Compute the scales of all weights in one all-reduce; else each gather would need one of its own."""
        if self.all_gather:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(module)

    def saved_weights(self, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace shards whose class says how they are gathered by plain ones over the same memory."""
        if not self.all_gather:
            return state
        from torch.distributed.tensor import DTensor
        from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

        def plain(tensor: Tensor) -> Tensor:
            local = tensor.to_local() if isinstance(tensor, DTensor) else None
            if not isinstance(tensor, DTensor) or not isinstance(local, WeightWithDynamicFloat8CastTensor):
                return tensor
            whole: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride()}
            return DTensor.from_local(local._tensor, tensor.device_mesh, tensor.placements, run_check=False, **whole)

        return {name: plain(tensor) for name, tensor in state.items()}

    def __repr__(self) -> str:
        return (
            f"FP8(recipe={self.recipe!r}, emulate={self.emulate}, skip={self.skip}, all_gather={self.all_gather}, "
            f"pad={self.pad})"
        )


def autocast_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast a layer's input to autocast's dtype on the CPU; Float8Linear does it for CUDA's autocast alone."""
    if not torch.is_autocast_enabled("cpu"):
        return inputs
    return (inputs[0].to(torch.get_autocast_dtype("cpu")), *inputs[1:])


def machine_lacks() -> str | None:
    """What this machine would need to multiply float8 numbers, as half a sentence; None where it can."""
    if not torch.cuda.is_available():
        return "this machine has no GPU (it takes an NVIDIA one of compute capability 8.9 or above, or an AMD MI300)"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
        return None if architecture.startswith(("gfx94", "gfx95")) else f"{properties.name} has none (an MI300 has)"
    if (properties.major, properties.minor) >= (8, 9):
        return None
    return f"{properties.name} has compute capability {properties.major}.{properties.minor} (they came with 8.9)"


def require_torchao(precision: str) -> None:
    """Refuse to run without torchao."""
    if find_spec("torchao") is None:
        raise ValueError(
            f"precision={precision!r} comes from the package torchao, which isn't installed. "
            "Run: pip install 'stratagem[fp8]'"
        )
