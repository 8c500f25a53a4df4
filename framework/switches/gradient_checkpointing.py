"""Activation checkpointing: blocks keep their inputs only and compute the rest again in backward."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from ...strategies.base import Strategy
from ..module import TrainModule
from .forwards import Forward, wrap_forward

MODELS_FUNCTION = "_gradient_checkpointing_func"  # where a model of transformers keeps torch's


def enable_gradient_checkpointing(module: TrainModule, options: Mapping[str, Any], strategy: Strategy) -> None:
    """Have a module's blocks recomputed in backward (Chen et al., 2016); its parameters keep their names.

    A model with a method of its own for it (as transformers' have, under a new name since version 5) is asked to; else
    each of ``shard_units()`` is recomputed as a whole, in training only.

    Args:
        module: before the strategy places it.
        options: of torch.utils.checkpoint.checkpoint; ``use_reentrant`` is False unless given.
        strategy: brings the function that recomputes; a model of transformers is handed it.

    Raises:
        ValueError: the module has no blocks to recompute.
    """
    options = {**strategy.recompute_options, **options}
    for kind in ("activation_checkpointing", "gradient_checkpointing"):
        own = getattr(module, f"{kind}_enable", None)
        if own is not None:
            own(**{f"{kind}_kwargs": options})
            for layer in module.modules():
                if hasattr(layer, MODELS_FUNCTION):
                    setattr(layer, MODELS_FUNCTION, partial(strategy.recompute, **options))
            return
    units = module.shard_units()
    if not units:
        raise ValueError(
            f"gradient_checkpointing needs blocks to recompute, and {type(module).__name__} has no list of two or more "
            "layers of one class. Write shard_units(self) on your TrainModule."
        )
    for unit in units:
        wrap_forward(unit, lambda forward: recomputed(forward, strategy.recompute, options))


def recomputed(forward: Forward, recompute: Callable[..., Any], options: Mapping[str, Any]) -> Forward:
    """A block's forward, checkpointed while the block is in training."""

    def call(unit: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not unit.training:
            return forward(unit, *args, **kwargs)
        return recompute(MethodType(forward, unit), *args, **options, **kwargs)

    return call
