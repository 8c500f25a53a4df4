"""The runs that the zoo compares: the same six updates under every placement, in this process or on two ranks."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Fit
from torch import Tensor
from torch.utils.data import DataLoader
from training import curves, make_fit

UPDATES, SAVED_AT = 6, 3
PLACEMENTS: dict[str, str] = {
    "ddp": "ddp",
    "fsdp1": "fsdp1",
    "fsdp2": "fsdp2",
    "tp": "tp",
    "ZeRO 3": "deepspeed_stage_3",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile": True},
}
TRANSITIONS = [("single", "fsdp2"), ("fsdp2", "ddp"), ("fsdp1", "single"), ("ZeRO 3", "fsdp2")]


def make(name: str, strategy: str, directory: str, **arguments: Any) -> Fit:
    """A Fit of a family: four samples a micro-batch over all ranks, two micro-batches an update. Every rank but the
    first begins with other weights, which must not matter.
    """
    family, rank = FAMILIES[name], int(os.environ.get("RANK", "0"))
    sharing = 1 if strategy in ("single", "tp") else 2
    torch.manual_seed(rank)
    module, rows = family.make(), family.rows(family.samples)
    data: Any = rows if family.collate is None else DataLoader(rows, 4 // sharing, collate_fn=family.collate)  # type: ignore[arg-type]
    defaults: dict[str, Any] = {
        "max_steps": UPDATES,
        "per_device_train_batch_size": 4 // sharing,
        "gradient_accumulation_steps": 2,
        "shuffle": False,
        "learning_rate": 0.005,
        "adam_epsilon": family.adam_epsilon,
        "output_dir": directory,
    }
    return make_fit(module, data, strategy=strategy, **{**defaults, **arguments})


def train(
    name: str, strategy: str, directory: str, resume: str | None = None, saves: bool = True, **arguments: Any
) -> dict[str, Any]:
    """One run, saved half way and exported at its end: its curves, or the words of its refusal."""
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT} if saves else {}
    try:
        fit = make(name, strategy, directory, **saving, **arguments)
        fit.train(resume_from_checkpoint=resume)
        fit.export(f"{directory}/weights.safetensors")
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    found = curves(fit)
    return {"loss": found["loss"], "grad_norm": found["grad_norm"]}


class Runs:
    """Runs that several tests look at, each made once.

    Args:
        ranks: two of them.
        directory: below which every run has one of its own.
    """

    def __init__(self, ranks: Ranks, directory: Path) -> None:
        self.ranks = ranks
        self.directory = directory
        self.done: dict[tuple[str, str], dict[str, Any]] = {}

    def path(self, name: str, placement: str) -> Path:
        """The directory of a family's run."""
        return self.directory / f"{name}-{placement}".replace(" ", "_").replace(",", "")

    def of(self, name: str, placement: str) -> dict[str, Any]:
        """A family's curves under a placement, or the words of its refusal."""
        if (name, placement) not in self.done:
            self.done[name, placement] = self.run(name, placement, self.path(name, placement))
        return self.done[name, placement]

    def run(self, name: str, placement: str, directory: Path, **arguments: Any) -> dict[str, Any]:
        """Train a family under a placement; every rank must give the same."""
        if placement == "single":
            return train(name, "single", str(directory), **arguments)
        job = {"name": name, "strategy": PLACEMENTS[placement], "directory": str(directory), **arguments}
        found = self.ranks.run(train, seconds=60.0, **job)
        if "refused" not in found[0]:
            assert found[0] == found[1], "the ranks' curves are two"
        return found[0]


def difference(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """The largest relative difference of losses and norms."""
    pairs = [pair for key in ("loss", "grad_norm") for pair in zip(found[key], expected[key], strict=True)]
    assert all(math.isfinite(a) for a, _ in pairs)
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)


def weights_difference(found: Path, expected: Path) -> float:
    """The largest difference of two exports' weights."""
    ours, theirs = load_file(found / "weights.safetensors"), load_file(expected / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    return max((largest(ours[name], theirs[name]) for name in ours), default=0.0)


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a.to(torch.complex128) - b.to(torch.complex128)).abs().max().item() if a.numel() else 0.0
