"""Activation checkpointing: blocks keep only their inputs, and compute the rest again in backward."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ...strategies.base import Strategy
from ..module import TrainModule
from .forwards import Forward, wrap_forward

MODELS_FUNCTION = (
    "_gradient_checkpointing_func"  # the attribute in which layers of transformers keep the function that recomputes
)


def enable_gradient_checkpointing(module: TrainModule, options: Mapping[str, Any], strategy: Strategy) -> None:
    """Have the blocks of a module recomputed in backward (Chen et al., 2016). Parameters keep their names.

    Where the model has a method of its own for this, it is called (models of transformers have one, under a new name
    since version 5). Else each of ``shard_units()`` is recomputed as a whole, in training only.

    Args:
        module: not placed yet.
        options: options of torch.utils.checkpoint.checkpoint; ``use_reentrant`` is False unless it is given.
        strategy: it has the function that recomputes, which a model of transformers is given.

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
    """Wrap the forward of a block so that it is recomputed while the block is in training."""

    def call(unit: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not unit.training:
            return forward(unit, *args, **kwargs)
        return recompute(forward, unit, *args, **options, **kwargs)  # torch.compile doesn't know how to bind a method

    return call
