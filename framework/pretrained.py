"""A directory that ``from_pretrained`` loads, written by the model's own ``save_pretrained`` from placed weights."""

from pathlib import Path
from typing import Any

from ..strategies.base import Strategy
from . import checkpoint
from .agreement import on_all_ranks


def save_pretrained(strategy: Strategy, directory: Path, only_trainable: bool, **options: Any) -> None:
    """Have the module write its configuration and weights. Collective; rank 0 holds the weights and writes.

    Args:
        strategy: holds the placed module, which has a ``save_pretrained`` (transformers' and peft's models do).
        directory: is made.
        only_trainable: gather no frozen weights for a peft model, which writes its adapters alone anyway. Any other
            model needs all its weights in the directory, and gets them.
        **options: of the module's ``save_pretrained``.

    Raises:
        ValueError: the module has no such method, or quantized weights to write.
        RuntimeError: on every rank, where the first could not write.
    """
    save = getattr(strategy.module, "save_pretrained", None)
    if save is None:
        raise ValueError(
            f"{type(strategy.module).__name__} has no save_pretrained to write a directory with. "
            'Use fit.export("weights.safetensors").'
        )
    adapters = hasattr(strategy.module, "peft_config")
    weights = checkpoint.whole_weights(strategy, only_trainable and adapters, adapters=adapters)

    def write() -> None:
        with strategy.unwrapped():  # peft looks for its adapters by the names of layers
            save(directory, state_dict=weights, **options)

    on_all_ranks(strategy, lambda: write() if strategy.is_main else None, RuntimeError)
