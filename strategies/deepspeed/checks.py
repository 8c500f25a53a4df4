"""What DeepSpeed's engine can't take, refused by name."""

import importlib.util
import traceback

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...precision.base import Precision
from ...precision.frozen import frozen_parts

NO_NESTED_TENSORS = (
    "Stage 3 of strategy='deepspeed' puts its own linear layers in the place of torch's, and their backward can't take "
    "nested tensors. Pass strategy=DeepSpeed(config={'zero_optimization': {'stage': 3, 'memory_efficient_linear': "
    "False}}), which leaves torch's, or use strategy='fsdp2'."
)


def check_package() -> None:
    """Refuse to run without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "strategy='deepspeed' needs the package deepspeed, which isn't installed. With torch installed, run: "
            "pip install setuptools wheel ninja py-cpuinfo packaging; "
            "pip install --no-build-isolation 'stratagem[deepspeed]'"
        )


def check_precision(precision: Precision) -> None:
    """Refuse what ZeRO can't compute in.

    Raises:
        ValueError: says why, and what works.
    """
    works = "Use precision='bf16-mixed', or '32-true'"
    if precision.scales_loss:
        raise ValueError(
            f"precision={precision.name!r} doesn't work under strategy='deepspeed': float16 by autocast never trains "
            f"under ZeRO, which takes every scaled gradient for an overflow. {works}."
        )
    if precision.parameter_dtype not in (None, torch.float32):
        raise ValueError(
            f"precision={precision.name!r} keeps parameters in {precision.parameter_dtype}, and strategy='deepspeed' "
            f"steps float32 master weights. {works}."
        )
    if precision.computes_by_itself:
        raise ValueError(
            f"precision={precision.name!r} has layers, weights or steps of its own, and under strategy='deepspeed' the "
            f"engine has those. {works}."
        )


def check_parameters(module: nn.Module, stage: int) -> None:
    """Refuse parameters that the engine can't take.

    Args:
        module: whose.
        stage: of ZeRO.

    Raises:
        ValueError: names them, says why, and what works.
    """
    found = [f"{name} ({parameter.dtype})" for name, parameter in module.named_parameters() if parameter.is_complex()]
    if found:
        raise ValueError(
            f"strategy='deepspeed' can't train complex parameters: the engine lays real numbers end to end. Found: "
            f"{', '.join(found)}. Use strategy='fsdp2' or 'ddp', or hold torch.view_as_real(...) of them as parameters "
            "and write torch.view_as_complex(...) in forward."
        )
    found = [
        f"{name!r} ({mark.precision})"
        for name, mark in frozen_parts(module).items()
        if mark.format is not None and mark.format.parameters != torch.float32
    ]
    if found:
        raise ValueError(
            "strategy='deepspeed' takes a module whose parameters are all float32, and these frozen parts have a "
            f"precision of their own: {', '.join(found)}. Write frozen(..., precision='bf16-mixed'), which computes in "
            "bfloat16 with float32 parameters, or use strategy='fsdp2' or 'ddp'."
        )
    cut = (torch.float16, torch.bfloat16, torch.float32)
    found = [f"{name} ({p.dtype})" for name, p in module.named_parameters() if stage == 3 and p.dtype not in cut]
    if found:
        raise ValueError(
            "Stage 3 of strategy='deepspeed' cuts every parameter, frozen ones too, and takes float16, bfloat16 and "
            f"float32 alone. Found: {', '.join(found)}. Make them buffers by register_buffer(...), or use "
            "strategy='deepspeed_stage_2' or 'fsdp2'."
        )


def optimizer_problem(optimizer: Optimizer) -> str | None:
    """Why an optimizer doesn't work on flat shards without knowing the parameters in them; None where it does."""
    works = "Use optim='adamw', or 'sgd'"
    if hasattr(optimizer, "train") or hasattr(optimizer, "parts") or hasattr(optimizer, "updates_in_backward"):
        return f"the engine steps flat shards, and hands on neither its switches nor its parts. {works}"
    if isinstance(optimizer, torch.optim.Adagrad):
        return f"the engine replaces it by one of its own making, without its groups. {works}"
    return None


def met_nested(error: BaseException) -> bool:
    """Whether a nested tensor was at hand where an error arose."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(isinstance(value, Tensor) and value.is_nested for f in frames for value in f.f_locals.values())
