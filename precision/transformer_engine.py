"""8-bit floating-point matrix products by NVIDIA's Transformer Engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .base import MaxReduce, ShapesOnRank
from .linear_layers import HEADS, put_in_place, qualifying, tied_weights
from .mixed import BF16Mixed

MULTIPLE = 16
RECIPES = {  # recipe to class in transformer_engine.common.recipe
    "current": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


class TransformerEngine(BF16Mixed):
    """``precision="fp8-te"``: Transformer Engine's Linear in the place of nn.Linear, on GPUs; bfloat16 elsewhere.

    Parameters are float32 and checkpoints hold their plain names. The positions of a micro-batch (samples times length)
    must be a multiple of 16.

    Args:
        recipe: how scales are found: "current", from the tensor itself; "delayed", from its last 1024 updates (a
            resumed run gathers them anew); "block", for each 128 x 128; "mxfp8", for each 32, on Blackwell.
        skip: patterns of layer names to leave in bfloat16. Layers whose sizes aren't multiples of 16 stay there too, as
            do those that share their weight.

    Raises:
        ValueError: Transformer Engine can't be imported; precision="fp8" needs no more than torchao.

    Example:
        ``Fit(module, data, strategy="fsdp2", precision=TransformerEngine(recipe="delayed"))``
    """

    name = "fp8-te"
    computes_by_itself = True
    refused_arguments = {
        "gradient_checkpointing": "backward would compute blocks again outside of Transformer Engine's autocast, in "
        "other numbers. Leave it out, or use precision='fp8'.",
        "contrastive_chunks": "computes each piece twice, which delayed scales would count as two updates. Leave it "
        "out, or use precision='fp8'.",
    }

    def __init__(self, recipe: str = "current", skip: Sequence[str] = HEADS) -> None:
        if recipe not in RECIPES:
            known = ", ".join(map(repr, RECIPES))
            raise ValueError(f"TransformerEngine(recipe=...) takes {known}. Received: {recipe!r}")
        if isinstance(skip, str):
            raise TypeError(f"TransformerEngine(skip=...) takes several patterns; write skip=({skip!r},)")
        try:
            self.te: Any = import_module("transformer_engine.pytorch")
            recipes: Any = import_module("transformer_engine.common.recipe")
        except (ImportError, OSError, RuntimeError, AssertionError) as error:  # its import looks for CUDA's libraries
            raise ValueError(
                f"precision='fp8-te' needs NVIDIA's Transformer Engine, which can't be imported here ({error}). On a "
                "machine with CUDA and an NVIDIA GPU of compute capability 8.9 or above, run: pip install "
                "--no-build-isolation 'stratagem[fp8-te]'. precision='fp8' does much the same by torchao, and "
                "FP8(emulate=True) does so on any machine."
            ) from error
        self.recipe, self.skip = recipe, tuple(skip)
        self.scaling = getattr(recipes, RECIPES[recipe])()

    def set_up(self, device: torch.device, max_over_ranks: MaxReduce) -> None:
        """Refuse devices other than CUDA's."""
        super().set_up(device, max_over_ranks)
        if device.type != "cuda":
            raise ValueError(
                f"precision='fp8-te' runs on CUDA GPUs, and this run's device is {device}. "
                "Use precision=FP8(emulate=True), or 'bf16-mixed'."
            )

    def replace_layers(self, module: nn.Module, shapes: ShapesOnRank) -> None:
        """Put Transformer Engine's Linear, with the same weights and biases, in the place of each nn.Linear."""
        tied = tied_weights(module)
        for name, layer in qualifying(module, self.name, self.skip, MULTIPLE, shapes).items():
            if id(layer.weight) in tied:
                continue
            if layer.weight.is_meta:
                raise ValueError(
                    f"precision='fp8-te' can't replace {name!r}, which build() makes: its values come later. Make "
                    "it in __init__, name it in TransformerEngine(skip=...), or use precision='fp8'."
                )
            put_in_place(module, layer, self.linear(layer))

    def linear(self, layer: nn.Linear) -> nn.Module:
        """Make a te.Linear that computes as ``layer`` does."""
        # Its extra state, a pickle, would be one more name in checkpoints.
        plain = {"get_extra_state": nn.Module.get_extra_state, "set_extra_state": nn.Module.set_extra_state}
        new: nn.Module = type("Linear", (self.te.Linear,), plain)(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            params_dtype=layer.weight.dtype,
            device=self.device,
        )
        with torch.no_grad():
            for name, parameter in layer.named_parameters(recurse=False):
                copied = getattr(new, name)
                copied.copy_(parameter)
                copied.requires_grad_(parameter.requires_grad)
        return new

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Enter Transformer Engine's autocast inside of torch's."""
        with super().forward_context(), self.te.autocast(enabled=True, recipe=self.scaling):
            yield

    def __repr__(self) -> str:
        return f"TransformerEngine(recipe={self.recipe!r}, skip={self.skip})"
