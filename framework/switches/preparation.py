"""Preparation of a run, as its arguments ask: changes to the blocks of the module, and callbacks."""

from functools import partial

import torch

from ...precision.frozen import frozen_parts
from ...precision.quantized import keep_trainable
from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..callbacks import Callback
from ..fields import durations
from ..fields.compilation import UPDATE
from ..module import TrainModule
from .forwards import wrap_forward
from .gradient_checkpointing import enable_gradient_checkpointing


def prepare_module(module: TrainModule, args: FitArguments, strategy: Strategy) -> None:
    """Switch on activation checkpointing, then compilation, as the arguments ask. Parameters keep their names.

    Args:
        module: it has all its layers, and isn't sharded or wrapped yet.
        args: the arguments of the run.
        strategy: it says how blocks are recomputed.

    Raises:
        ValueError: an argument has no effect on this module.
    """
    if args.save_only_trainable and all(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"save_only_trainable=True has no effect: {type(module).__name__} has no frozen parameters. Leave it out, "
            "or freeze some (requires_grad_(False)) before Fit is given the module."
        )
    always = [name for name, part in frozen_parts(module).items() if part.saved == "always"]
    if args.save_only_trainable and always:
        raise ValueError(
            f"save_only_trainable=True leaves frozen parameters out of checkpoints, and frozen(..., saved='always') "
            f"keeps those of {', '.join(map(repr, always))} in them. Leave one of the two out."
        )
    keep_trainable(module)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(module, args.gradient_checkpointing_kwargs, strategy)
    if args.torch_compile is True:
        # Blocks are compiled one by one: their common code is compiled once, and sharding can work between blocks.
        for part in module.shard_units() or [module]:
            # part.compile() won't do: it silently does nothing for torch's own classes, such as nn.Sequential.
            wrap_forward(part, partial(torch.compile, **compile_options(args)))


def compile_options(args: FitArguments) -> dict[str, str]:
    """Return the options of torch.compile."""
    return {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}


def callbacks_of(args: FitArguments) -> list[Callback]:
    """Make the callbacks that the arguments ask for."""
    found: list[Callback] = []
    if args.neftune_noise_alpha is not None:
        from .neftune import NEFTune

        found.append(NEFTune(args.neftune_noise_alpha))
    if args.debug == "underflow_overflow":
        from .numeric_debugger import NumericDebugger

        found.append(NumericDebugger())
    if args.torch_compile:
        from ..builtin_callbacks import FirstStepTime

        # The first update makes the optimizer's state; what torch_compile="update" asks for is compiled in the second.
        found.append(FirstStepTime(updates=2 if args.torch_compile == UPDATE else 1))
    if args.torch_empty_cache_steps is not None:
        from ..builtin_callbacks import EmptyCache

        found.append(EmptyCache(args.torch_empty_cache_steps))
    if args.max_time is not None:
        from .time_limit import TimeLimit

        found.append(TimeLimit(durations.seconds(args.max_time) or 0.0))
    if args.auto_find_batch_size:
        from ..builtin_callbacks import LogBatchSize

        found.append(LogBatchSize())
    return found
