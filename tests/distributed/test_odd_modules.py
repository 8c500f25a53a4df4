"""Modules that sharding and reduction are not made for, on real ranks: as on one device, or refused by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankFailure, Ranks
from safetensors.torch import load_file
from stratagem import FitArguments, TrainModule
from torch import Tensor, nn
from training import curves, make_fit

WIDTH = 4
TOLERANCE = 1e-6
BATCH = 8

SHARDED: list[tuple[int, str, dict[str, Any]]] = [
    (2, "fsdp1", {}),
    (2, "fsdp2", {}),
    (4, "fsdp1", {"replicas": 2}),
    (4, "fsdp2", {"replicas": 2}),
    (4, "fsdp2", {"tensor_parallel": 2}),
]
ZERO: list[tuple[int, str, dict[str, Any]]] = [(2, "deepspeed", {"stage": stage}) for stage in (0, 1, 2, 3)]
TWO = [(2, "fsdp1", {}), (2, "fsdp2", {})]


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    """Rows of "x" and "y"."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, WIDTH, generator=generator)
    return [{"x": row, "y": row.sum().sin().reshape(1)} for row in x]


class Base(TrainModule):
    """Squared error, and AdamW with every kind of group."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        fused = not any(p.is_complex() for p in trainable)
        return torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.1, fused=fused)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Block(nn.Module):
    """A block with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH)
        self.temperature = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * self.temperature


class Scalars(Base):
    """Parameters without dimensions: of the root, of each block, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.logit_scale = nn.Parameter(torch.rand(()) + 1.0)
        self.shift = nn.Parameter(torch.rand(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.logit_scale.exp() + self.shift


class LateScalars(Scalars):
    """The same, made in ``build``."""

    def __init__(self) -> None:
        TrainModule.__init__(self)

    def build(self) -> None:
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.ones(()), requires_grad=False)

    def init_weights(self, layer: nn.Module) -> None:
        if isinstance(layer, Block):
            nn.init.uniform_(layer.temperature, 0.5, 1.5)
        elif layer is self:
            nn.init.uniform_(self.logit_scale)
            nn.init.uniform_(self.shift)
        else:
            super().init_weights(layer)


class Complexes(Base):
    """A spectral layer, whose weights are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.spectral = nn.Parameter(torch.randn(WIDTH // 2 + 1, WIDTH // 2 + 1, dtype=torch.complex64))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(torch.tanh(self.inner(x))) @ self.spectral, n=WIDTH))


class Integers(Base):
    """Frozen parameters of integers and of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)
        self.order = nn.Parameter(torch.randperm(WIDTH), requires_grad=False)
        self.mask = nn.Parameter(torch.arange(WIDTH) % 3 > 0, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))[:, self.order] * self.mask)


class OnlyScalars(Base):
    """y = a x + b, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(()))
        self.b = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.mean(1, keepdim=True) + self.b


def share(strategy: str, world: int, options: dict[str, Any]) -> int:
    """Samples per rank in an update of BATCH."""
    return BATCH * options.get("tensor_parallel", 1) // world


def run(module: type[TrainModule], export: str | Path | None = None, resume: Any = None, **arguments: Any) -> Any:
    """Train on one process or a rank; other initial values on each rank, of which rank 0's count.

    Returns:
        The training logs as a list under each name.
    """
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    arguments = {"max_steps": 6, "max_grad_norm": 0.3, "per_device_train_batch_size": BATCH, **arguments}
    fit = make_fit(module(), rows(), **arguments)
    fit.train(resume_from_checkpoint=resume)
    if export is not None:
        fit.export(export)
    return curves(fit)


def assert_close(one: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    """Losses and norms agree."""
    for name in ("loss", "grad_norm"):
        assert other[name] == pytest.approx(one[name], rel=TOLERANCE, abs=TOLERANCE), name


def assert_same_weights(one: Path, other: Path) -> None:
    """Two exports agree."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("world", "strategy", "options"), [*SHARDED, *ZERO], ids=str)
def test_parameters_without_dimensions_train_as_on_one_device(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, options: dict[str, Any]
) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    expected = run(Scalars, one)
    logs = ranks[world].run(
        run,
        module=Scalars,
        export=other,
        strategy=strategy,
        options=options,
        per_device_train_batch_size=share(strategy, world, options),
    )
    assert_close(expected, logs[0])
    assert_same_weights(one, other)


@pytest.mark.parametrize(("world", "strategy", "options"), TWO, ids=str)
@pytest.mark.parametrize("module", [LateScalars, Complexes, Integers, OnlyScalars])
def test_what_cannot_be_cut_is_kept_whole(
    ranks: dict[int, Ranks],
    tmp_path: Path,
    module: type[TrainModule],
    world: int,
    strategy: str,
    options: dict[str, Any],
) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    expected = run(module, one)
    logs = ranks[world].run(
        run, module=module, export=other, strategy=strategy, options=options, per_device_train_batch_size=BATCH // world
    )
    assert_close(expected, logs[0])
    assert_same_weights(one, other)


@pytest.mark.parametrize(("strategy", "options"), [("fsdp1", {}), ("fsdp2", {}), ("deepspeed", {"stage": 3})], ids=str)
@pytest.mark.parametrize("module", [Scalars, Complexes])
def test_checkpoints_hold_what_is_kept_whole(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, options: dict[str, Any], module: type[TrainModule]
) -> None:
    """Saved at 3 of 6, then: resumed in place to the bit; on one device, and from there, to rounding."""
    if strategy == "deepspeed" and module is Complexes:
        return  # refused
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "module": module}
    there = {"strategy": strategy, "options": options, "per_device_train_batch_size": BATCH // 2}
    one = run(output_dir=str(tmp_path / "one"), **saving)
    whole = ranks[2].run(run, output_dir=str(tmp_path / "there"), **saving, **there)[0]
    again = ranks[2].run(run, resume=tmp_path / "there/checkpoint-3", output_dir=str(tmp_path / "b"), **saving, **there)
    assert again[0]["loss"] == whole["loss"]
    here = run(resume=tmp_path / "there/checkpoint-3", output_dir=str(tmp_path / "c"), **saving)
    assert_close(one, here)
    moved = ranks[2].run(run, resume=tmp_path / "one/checkpoint-3", output_dir=str(tmp_path / "d"), **saving, **there)
    assert_close(one, moved[0])


def fails(ranks: Ranks, job: Callable[..., Any], match: str, **options: Any) -> None:
    """Every rank refuses, with a message that matches."""
    with pytest.raises(RankFailure, match=match):
        ranks.run(job, **options)


def test_zero_refuses_complex_parameters_by_name(ranks: dict[int, Ranks]) -> None:
    fails(ranks[2], run, r"can't train complex parameters.*spectral.*view_as_real", module=Complexes, strategy="deepspeed")
