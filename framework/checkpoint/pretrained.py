"""Saving of placed weights by the model's own ``save_pretrained``, into a directory that ``from_pretrained`` loads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...strategies.base import Strategy
from .. import checkpoint
from ..agreement import on_all_ranks


def save_pretrained(strategy: Strategy, directory: Path, only_trainable: bool, **options: Any) -> None:
    """Have the module write its configuration and weights. Collective; rank 0 holds the weights and writes.

    Args:
        strategy: it holds the placed module, which has a ``save_pretrained`` (models of transformers and peft do).
        directory: the folder to write, which is made.
        only_trainable: gather no frozen weights for a peft model, which writes its adapters alone anyway. Any other
            model needs all its weights in the directory, and writes them.
        **options: options of the module's ``save_pretrained``.

    Raises:
        ValueError: the module has no such method, or quantized weights to write.
        RuntimeError: on every rank, where rank 0 could not write.
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
        # peft finds its adapters by the names of layers, and reads soft prompts from the module itself.
        with strategy.unwrapped(), whole_parameters(strategy.module, weights):
            save(directory, state_dict=weights, **options)

    on_all_ranks(strategy, lambda: write() if strategy.is_main else None, RuntimeError)


@contextmanager
def whole_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Entered with whole weights in the place of this rank's shards: parameters by name are those of ``weights``."""
    shards = []
    for name, whole in weights.items():
        prefix, _, last = name.rpartition(".")
        layer = module.get_submodule(prefix)
        if last in layer._parameters:
            shards.append((layer, last, layer._parameters[last]))
            layer._parameters[last] = nn.Parameter(whole, requires_grad=False)
    try:
        yield
    finally:
        for layer, last, shard in shards:
            layer._parameters[last] = shard
