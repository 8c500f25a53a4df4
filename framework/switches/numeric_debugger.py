"""The callback of debug="underflow_overflow", which finds the first layer with an inf or NaN."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ..arguments import FitArguments
from ..callbacks import Callback
from ..state import Control, TrainState


class NumericDebugger(Callback):
    """Looks at the inputs, weights and outputs of every layer in forward, and ends training at the first inf or NaN.

    Each look waits for the device, so that a run with this callback is slow.

    Args:
        frames: how many layers before the first bad one the error shows.
    """

    def __init__(self, frames: int = 21) -> None:
        self.frames: deque[str] = deque(maxlen=frames)
        self.hooks: list[Any] = []

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Register a forward hook on every layer."""
        self.state = state
        for name, layer in fit.module.named_modules():
            self.hooks.append(layer.register_forward_hook(self.watch(name or "(the module itself)")))

    def watch(self, name: str) -> Any:
        """Make the forward hook of a layer."""

        def look(layer: nn.Module, inputs: Any, outputs: Any) -> None:
            parts = {"input": inputs, "output": outputs}
            parts |= {f"weight {key}": p for key, p in layer.named_parameters(recurse=False)}
            lines, bad = [], []
            for part, values in parts.items():
                for tensor in tree_leaves(values):
                    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
                        continue
                    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
                    low, high = torch.aminmax(local.abs())
                    lines.append(f"    {part}: abs min {low.item():.2e}, abs max {high.item():.2e}")
                    if not torch.isfinite(local).all():
                        bad.append(part)
            self.frames.append("\n".join([f"  {name} ({type(layer).__name__})", *lines]))
            if bad:
                raise FloatingPointError(
                    f"In update {self.state.global_step + 1}, the {' and the '.join(bad)} of {name!r} "
                    f"({type(layer).__name__}) overflowed or became NaN. The last layers, in the order of forward:\n"
                    + "\n".join(self.frames)
                )

        return look

    def on_train_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Remove the forward hooks."""
        self.remove()

    def on_exception(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Remove the forward hooks."""
        self.remove()

    def remove(self) -> None:
        """Remove the forward hooks, where there are any."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
