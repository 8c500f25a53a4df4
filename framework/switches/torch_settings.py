"""Settings of torch that hold for the whole process: set for a run, and restored after it."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..arguments import FitArguments

WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""The environment variable that makes cuBLAS deterministic. It is read once in a process, so it stays set."""


@contextmanager
def of_run(args: FitArguments, device: torch.device) -> Iterator[None]:
    """Entered around a run, with the settings that its arguments ask for.

    Args:
        args: of the run.
        device: the device of the run.
    """
    with contextlib.ExitStack() as settings:
        if args.full_determinism:
            settings.enter_context(deterministic())
        if args.tf32 is not None and device.type == "cuda":
            settings.enter_context(float32_products("tf32" if args.tf32 else "ieee"))
        if args.torch_compile and args.gradient_checkpointing:
            settings.enter_context(compiled_side_effects())
        yield


def compiled_side_effects() -> contextlib.AbstractContextManager[Any]:
    """Make a context in which torch compiles a block that logs and is computed again in backward, where it can."""
    from torch import _dynamo

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # not in torch 2.9: such a block runs there as it is
    return _dynamo.config.patch({name: True}) if hasattr(_dynamo.config, name) else contextlib.nullcontext()


@contextmanager
def deterministic() -> Iterator[None]:
    """Entered where torch must compute the same bits every time, or raise."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@contextmanager
def float32_products(kind: str) -> Iterator[None]:
    """Entered where CUDA multiplies float32 matrices, and convolves, in "tf32" or "ieee"."""
    cudnn: Any = torch.backends.cudnn
    owners: list[Any] = [torch.backends.cuda.matmul, cudnn.conv]
    before = [owner.fp32_precision for owner in owners]
    for owner in owners:
        owner.fp32_precision = kind
    try:
        yield
    finally:
        for owner, kept in zip(owners, before, strict=True):
            owner.fp32_precision = kept


def check_tf32(device: torch.device) -> None:
    """Refuse TF32 on a device that has none.

    Raises:
        ValueError: the message says which devices have it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        raise ValueError(
            f"tf32=True: NVIDIA GPUs since Ampere (A100, RTX 30) multiply in TF32, and this run is on {device.type!r}. "
            "Leave it out, or write precision='bf16-mixed'."
        )
