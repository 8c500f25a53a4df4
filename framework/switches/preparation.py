"""What arguments add to a run before it begins: changes to the module's blocks, and callbacks."""

from functools import partial

import torch

from ...precision.quantized import keep_trainable
from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..callbacks import Callback
from ..module import TrainModule
from .forwards import wrap_forward
from .gradient_checkpointing import enable_gradient_checkpointing


def prepare_module(module: TrainModule, args: FitArguments, strategy: Strategy) -> None:
    """Activation checkpointing, then compilation, as the arguments ask for; parameters keep their names.

    Args:
        module: all its layers are there; it is not yet sharded or wrapped.
        args: of the run.
        strategy: says how blocks are recomputed.

    Raises:
        ValueError: an argument has no effect on this module.
    """
    if args.save_only_trainable and all(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"save_only_trainable=True has no effect: {type(module).__name__} has no frozen parameters. Leave it out, "
            "or freeze some (requires_grad_(False)) before Fit is given the module."
        )
    keep_trainable(module)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(module, args.gradient_checkpointing_kwargs, strategy)
    if args.torch_compile:
        # Block by block: every block is the same code, so it is compiled once, and sharding can work between blocks.
        for part in module.shard_units() or [module]:
            # Not part.compile(): that passes over classes of torch's own, such as nn.Sequential, without a word.
            wrap_forward(part, partial(torch.compile, **compile_options(args)))


def compile_options(args: FitArguments) -> dict[str, str]:
    """What torch.compile is asked for."""
    return {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}


def callbacks_of(args: FitArguments) -> list[Callback]:
    """The callbacks that arguments stand for."""
    found: list[Callback] = []
    if args.neftune_noise_alpha is not None:
        from .neftune import NEFTune

        found.append(NEFTune(args.neftune_noise_alpha))
    if args.debug == "underflow_overflow":
        from .numeric_debugger import NumericDebugger

        found.append(NumericDebugger())
    if args.torch_compile:
        from ..builtin_callbacks import FirstStepTime

        found.append(FirstStepTime())
    if args.torch_empty_cache_steps is not None:
        from ..builtin_callbacks import EmptyCache

        found.append(EmptyCache(args.torch_empty_cache_steps))
    if args.auto_find_batch_size:
        from ..builtin_callbacks import LogBatchSize

        found.append(LogBatchSize())
    return found
