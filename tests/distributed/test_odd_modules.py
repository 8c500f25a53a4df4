"""Modules that sharding and reduction are not made for, on real ranks: as on one device, or refused by name."""

import os
import re
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


class OddNames(Base):
    """Parameters called as wrappers call their module, and one without numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.model = nn.Parameter(torch.randn(WIDTH, 1))
        self.nothing = nn.Parameter(torch.empty(0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.module) @ self.model + self.nothing.sum()


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


@pytest.mark.parametrize(("world", "strategy", "options"), [*TWO, (2, "ddp", {})], ids=str)
@pytest.mark.parametrize(
    "module",
    [
        *(pytest.param(each, marks=pytest.mark.slow) for each in (LateScalars, Integers, OnlyScalars)),
        Complexes,
        OddNames,
    ],
)
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
@pytest.mark.parametrize("module", [Scalars, *(pytest.param(m, marks=pytest.mark.slow) for m in (Complexes, OddNames))])
def test_checkpoints_hold_what_is_kept_whole(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, options: dict[str, Any], module: type[TrainModule]
) -> None:
    """Saved at 3 of 6, then: resumed in place to the bit; on one device, and from there, to rounding."""
    if strategy == "deepspeed" and module is not Scalars:
        return  # complex ones are refused, and empty ones the engine can't hold
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


def refused(**options: Any) -> str:
    """What a run is refused with, on every rank alike: the ranks live on."""
    with pytest.raises(ValueError) as caught:
        run(**options)
    return str(caught.value)


def fails(ranks: Ranks, match: str, **options: Any) -> None:
    """Every rank refuses, with a message that matches."""
    for said in ranks.run(refused, **options):
        assert re.search(match, said), said


@pytest.mark.slow
def test_zero_refuses_complex_parameters_by_name(ranks: dict[int, Ranks]) -> None:
    fails(ranks[2], r"can't train complex parameters.*spectral.*view_as_real", module=Complexes, strategy="deepspeed")


class Tower(Base):
    """Blocks, and a head that ``loss`` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)
        self.spread = nn.Parameter(torch.rand(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return ((self.head(outputs) - batch["y"]) * self.spread.exp()).square().mean()


class BlockInLoss(Tower):
    """Its loss calls a layer of a block."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(self.blocks[1][0](outputs), batch)


class LayerOfFirstBlock(Tower):
    """Its forward begins in the first block (as a diffusers DiT does), before that block's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blocks[0][0](x))


class FirstBlockInRoot(LayerOfFirstBlock):
    """What the message says to write."""

    def shard_units(self) -> list[nn.Module]:
        return [block for block in super().shard_units() if block is not self.get_submodule("blocks.0")]


class Penalty(Tower):
    """Its loss has a penalty over all weights."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        penalty = torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()
        return super().loss(outputs, batch) + 0.01 * penalty


def run_and_evaluate(module: type[TrainModule], **arguments: Any) -> list[float]:
    """Losses of training and of two evaluations."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    arguments = {"max_steps": 6, "per_device_train_batch_size": BATCH, "eval_strategy": "steps", **arguments}
    fit = make_fit(module(), rows(), rows(19), eval_steps=3, **arguments)
    fit.train()
    fit.evaluate()
    return [log[name] for log in fit.state.log_history for name in ("loss", "eval_loss") if name in log]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("world", "strategy", "options"), [*TWO, (2, "fsdp1", {"reshard_after_forward": 0})], ids=str)
@pytest.mark.parametrize("module", [Tower, FirstBlockInRoot])
def test_a_loss_may_call_a_layer_of_the_root(
    ranks: dict[int, Ranks], module: Any, world: int, strategy: str, options: dict[str, Any], precision: str
) -> None:
    expected = run_and_evaluate(module, precision=precision)
    seen = ranks[world].run(
        run_and_evaluate,
        module=module,
        strategy=strategy,
        options=options,
        precision=precision,
        per_device_train_batch_size=BATCH // world,
    )
    assert seen[0] == pytest.approx(expected, rel=TOLERANCE if precision == "32-true" else 0.02)
    assert len(expected) == 9


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (BlockInLoss, r"'blocks\.1\.0' was used outside of the forward of 'blocks\.1'.*shard_units\(self\) on BlockIn"),
        (LayerOfFirstBlock, r"'blocks\.0\.0' was used outside.*block is not self\.get_submodule\('blocks\.0'\)"),
        (Penalty, r"'blocks\.\d[\w.]*' was used outside.*For a penalty on weights, use weight_decay"),
    ],
)
def test_a_layer_that_is_used_outside_of_its_block_is_told_by_name(
    ranks: dict[int, Ranks], module: type[TrainModule], message: str, strategy: str
) -> None:
    fails(ranks[2], message, module=module, strategy=strategy)


class Unused(Base):
    """A layer that no loss needs, and one that only the samples of some ranks do."""

    branches = False

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 1)
        self.other = nn.Linear(WIDTH, 1)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if self.branches and self.seen > 2 and os.environ.get("RANK") == "1":
            return self.other(x)
        return self.head(x) + (self.other(x) if self.branches else 0.0)


class Branches(Unused):
    """From the third update on, rank 1 takes another branch."""

    branches = True


UNREACHED = r"no gradient reached {0}\.weight, {0}\.bias on rank \d.*DDP\(find_unused_parameters=True\)"


def test_ddp_names_parameters_without_a_gradient(ranks: dict[int, Ranks]) -> None:
    fails(ranks[2], UNREACHED.format("other"), module=Unused, strategy="ddp", max_steps=1)


@pytest.mark.slow
def test_ddp_names_parameters_that_one_rank_had_no_gradient_for(ranks: dict[int, Ranks]) -> None:
    with pytest.raises(RankFailure, match=UNREACHED.format("head")):  # the other rank waits
        ranks[2].run(run, module=Branches, strategy="ddp")


def test_ddp_trains_with_unused_parameters_where_it_looks_for_them(ranks: dict[int, Ranks]) -> None:
    expected = run(Unused)
    seen = ranks[2].run(
        run,
        module=Unused,
        strategy="ddp",
        options={"find_unused_parameters": True},
        per_device_train_batch_size=BATCH // 2,
    )
    assert_close(expected, seen[0])


class Lookup(Base):
    """A sparse embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH, sparse=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table((x * 3).long().abs() % 7)).sum(1))

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)


def test_ddp_averages_sparse_gradients(ranks: dict[int, Ranks]) -> None:
    expected = run(Lookup)
    seen = ranks[2].run(run, module=Lookup, strategy="ddp", per_device_train_batch_size=BATCH // 2)
    assert_close(expected, seen[0])


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2", "deepspeed"])
def test_sharding_refuses_sparse_gradients_by_name(ranks: dict[int, Ranks], strategy: str) -> None:
    fails(ranks[2], r"can't shard the gradients of table: made with sparse=True", module=Lookup, strategy=strategy)


class Nested(Base):
    """Makes a nested tensor on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        ragged = torch.nested.nested_tensor(list(x[:, None]), layout=torch.jagged)
        return self.head(torch.tanh(self.inner(ragged).values()))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_nested_tensors_train_as_on_one_device(ranks: dict[int, Ranks], strategy: str) -> None:
    expected = run(Nested)
    seen = ranks[2].run(run, module=Nested, strategy=strategy, per_device_train_batch_size=BATCH // 2)
    assert_close(expected, seen[0])


@pytest.mark.slow
def test_stage_3_names_the_option_that_nested_tensors_need(ranks: dict[int, Ranks]) -> None:
    two: dict[str, Any] = {"module": Nested, "strategy": "deepspeed", "per_device_train_batch_size": BATCH // 2}
    message = r"Stage 3.*can't take nested tensors.*\{'stage': 3, 'memory_efficient_linear': False\}"
    fails(ranks[2], message, options={"stage": 3}, **two)
    config = {"zero_optimization": {"stage": 3, "memory_efficient_linear": False}}
    assert_close(run(Nested), ranks[2].run(run, options={"config": config}, **two)[0])


class Lists(Base):
    """Blocks that are lists of a norm and a layer of more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), Block()]) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in self.blocks:
            x = block(norm(x))
        return self.head(x)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {}


class XTransformer(Base):
    """A model of the package x-transformers, whose layers are a ModuleList of ModuleLists."""

    def __init__(self) -> None:
        super().__init__()
        x_transformers = pytest.importorskip("x_transformers")
        self.net = x_transformers.Encoder(dim=WIDTH, depth=2, heads=2, attn_dim_head=4)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x[:, None])[:, 0])


@pytest.mark.parametrize("module", [Lists, XTransformer])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_lists_of_lists_are_sharded_as_on_one_device(
    ranks: dict[int, Ranks], module: type[TrainModule], strategy: str
) -> None:
    if module is XTransformer:
        pytest.importorskip("x_transformers")
    expected = run(module)
    seen = ranks[2].run(run, module=module, strategy=strategy, per_device_train_batch_size=BATCH // 2)
    assert_close(expected, seen[0])


class Diffusion(Base):
    """A diffusers DiT, whose forward reaches into its first block."""

    def __init__(self) -> None:
        super().__init__()
        made_by = pytest.importorskip("diffusers").DiTTransformer2DModel
        sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "norm_num_groups": 2}
        self.net = made_by(sample_size=2, in_channels=1, patch_size=1, num_embeds_ada_norm=4, **sizes)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.head(self.net(x.view(-1, 1, 2, 2), steps, class_labels=steps).sample.flatten(1))


class DiffusionInRoot(Diffusion):
    """With the block that is reached into left to the root."""

    def shard_units(self) -> list[nn.Module]:
        return list(self.net.transformer_blocks)[1:]


def test_a_diffusion_transformer_is_told_what_to_write(ranks: dict[int, Ranks]) -> None:
    pytest.importorskip("diffusers")
    message = r"'net\.transformer_blocks\.0\.[\w.]+' was used outside of the forward of 'net\.transformer_blocks\.0'"
    for strategy in ("fsdp1", "fsdp2"):
        fails(ranks[2], message, module=Diffusion, strategy=strategy)
        ranks[2].run(run, module=DiffusionInRoot, strategy=strategy, max_steps=2)
