"""NEFTune: uniform noise on the input embeddings in training (Jain et al., 2023)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import FitArguments
from ..callbacks import Callback
from ..state import Control, TrainState


class NEFTune(Callback):
    """Adds noise from ±alpha / sqrt(L·d) to embeddings of L positions and d features, while the module trains.

    Args:
        alpha: size of the noise; the paper uses 5 to 15.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.hook: Any = None

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Register the hook that adds the noise, on the input embeddings of the placed module."""
        self.hook = input_embeddings(fit.module).register_forward_hook(self.add_noise)

    def add_noise(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """Add noise to the embeddings in training, and leave them in evaluation. This is the forward hook."""
        if not layer.training:
            return None
        size = self.alpha / (output.size(-2) * output.size(-1)) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    def on_train_end(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Remove the forward hook."""
        self.remove()

    def on_exception(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Remove the forward hook."""
        self.remove()

    def remove(self) -> None:
        """Remove the forward hook where one is registered."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None


def input_embeddings(module: nn.Module) -> nn.Module:
    """Find the layer that embeds the input: what ``get_input_embeddings()`` returns, else the first nn.Embedding.

    Raises:
        ValueError: the module has no such layer.
    """
    named = getattr(module, "get_input_embeddings", None)
    found = named() if named is not None else next((x for x in module.modules() if isinstance(x, nn.Embedding)), None)
    if found is None:
        raise ValueError(
            f"neftune_noise_alpha adds noise to input embeddings, and {type(module).__name__} has no nn.Embedding. "
            "Write get_input_embeddings(self), or leave the argument out."
        )
    return found
