"""Whole parameters on cut features: their gradients are summed over the tensor-parallel ranks, exactly once."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import Callback, TrainModule
from torch import Tensor, nn
from training import curves, make_fit, share_of_16

WIDTH, HEAD, HEADS = 8, 3, 4
LENGTH = 4


class Mixed(nn.Module):
    """Between the two cut layers: a norm on heads, a bias and a scale that the module uses itself, and a gate that is
    computed from a parameter of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HEADS * HEAD)
        self.head_norm = nn.LayerNorm(HEAD)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, HEAD))
        self.gate = nn.Linear(1, HEAD)
        self.down = nn.Linear(HEADS * HEAD, WIDTH)
        self.after = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(self.norm(x)).unflatten(-1, (-1, HEAD))
        gate = torch.sigmoid(self.gate(torch.ones(1)))
        heads = self.head_norm(heads) * self.scale * gate + torch.tanh(heads)
        return x + self.after * self.down(heads.flatten(-2))


class Stack(TrainModule):
    """Blocks of that kind; ``first`` is used on whole features only, and by the module itself."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.linspace(0.8, 1.2, WIDTH))
        self.blocks = nn.ModuleList(Mixed() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.first
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])

    def tensor_parallel_plan(self) -> dict[str, Any]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Unsharded(Stack):
    """Parts of blocks are used outside of their forward."""

    def shard_units(self) -> list[nn.Module]:
        return []


class BySequence(Unsharded):
    """Norms and scales on features that are cut by position; the plan doesn't name them."""

    def tensor_parallel_plan(self) -> dict[str, Any]:
        return {
            "blocks.0.up": "colwise",
            "blocks.0.down": "rowwise_to_sequence",
            "blocks.1.up": "colwise_from_sequence",
            "blocks.1.down": "rowwise",
        }

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        x = self.first * x
        y = first.down(torch.tanh(first.up(first.norm(x))))  # cut by position from here
        y = second.norm(y) * second.after
        return self.head(x + second.down(torch.tanh(second.up(y))))


class Stated(Stack):
    """The plan says what the strategy would find."""

    def tensor_parallel_plan(self) -> dict[str, Any]:
        own = {"blocks.*.head_norm": "used_on_cut", "blocks.*.gate": "used_on_cut", "blocks.*.norm": "used_on_whole"}
        return {**super().tensor_parallel_plan(), **own}


class Late(Unsharded):
    """A scale on cut features that has its first gradient in the third update."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Parameter(torch.full((HEAD,), 0.5))
        self.never = nn.Parameter(torch.ones(HEAD))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        block = self.blocks[0]
        heads = block.up(x).unflatten(-1, (-1, HEAD))
        heads = heads * self.late if self.calls > 2 * int(os.environ.get("ACCUMULATION", "2")) else heads
        return super().forward(x + block.down(heads.flatten(-2)))


class Frozen(Stack):
    """The norms on heads aren't trained."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.head_norm.requires_grad_(False)


class Both(Unsharded):
    """One norm on whole features and on cut ones."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.blocks[0].scale
        return super().forward(torch.cat([x[..., :HEAD] * scale, x[..., HEAD:]], dim=-1))


class Trespassing(Unsharded):
    """What a layer of the plan gives whole is multiplied with cut features."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        x = first(x)
        heads = second.up(x).unflatten(-1, (-1, HEAD)) * x[..., None, :HEAD]
        return self.head(x + second.down(heads.flatten(-2)))


def rows(count: int = 70) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, LENGTH, WIDTH, generator=generator)
    return [{"x": row, "y": row.sin().sum(dim=-1, keepdim=True)} for row in x]


class Watch(Callback):
    """Collects the gradients of the first update, and what the ranks hold whole after the third."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == 0:
            gradients = context["fit"].strategy.full_gradients()
            self.gradients = {name: gradient.clone() for name, gradient in gradients}

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == 3:
            parameters = context["fit"].strategy.named_parameters()
            self.whole = {n: p.to_local() if hasattr(p, "to_local") else p for n, p in parameters.items()}
            self.whole = {name: p.detach().clone() for name, p in self.whole.items()}


def train(module: type[TrainModule], path: str, strategy: str = "single", **arguments: Any) -> dict[str, Any]:
    """Seven updates of 16 samples, the last ones short; gradients go to a file."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    watch = Watch()
    fit = make_fit(module(), rows(), strategy=strategy, callbacks=[watch], **{"max_steps": 7, **arguments})
    fit.train()
    fit.export(f"{path}.safetensors")
    torch.save(watch.gradients, f"{path}-{fit.strategy.rank}.pt")
    partial = getattr(fit.strategy, "cut_features", None)
    logs = {name: values for name, values in curves(fit).items() if name != "first_step_seconds"}  # each rank's own
    return {**logs, "partial": sorted(partial.partial) if partial else []}


@cache
def single(module: type[TrainModule], precision: str = "32-true") -> tuple[dict[str, Any], Any, Any]:
    with TemporaryDirectory() as directory:
        batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
        found = train(module, f"{directory}/one", precision=precision, **batches)
        return found, torch.load(f"{directory}/one-0.pt"), load_file(f"{directory}/one.safetensors")


def check(
    ranks: dict[int, Ranks], directory: Path, module: type[TrainModule], world: int, strategy: str, **arguments: Any
) -> list[str]:
    """Train on ranks and compare curves, gradients and weights with one device; the summed parameters come back."""
    expected, gradients, weights = single(module)
    options = arguments.get("options", {})
    batches = {"per_device_train_batch_size": share_of_16(strategy, world, options) // 2}
    found = ranks[world].run(
        train,
        module=module,
        path=str(directory / "ranks"),
        strategy=strategy,
        gradient_accumulation_steps=2,
        **batches,
        **arguments,
    )
    assert found == [found[0]] * world
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    seen = torch.load(directory / "ranks-0.pt")
    assert seen.keys() == gradients.keys()
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, msg=name)
    for name, weight in load_file(directory / "ranks.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5, msg=name)
    return found[0]["partial"]


ON_CUT = ("gate.bias", "gate.weight", "head_norm.bias", "head_norm.weight", "scale")
WORLDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp-2": (2, "tp", {}),
    "tp-4": (4, "tp", {}),
    "fsdp2xtp-4": (4, "fsdp2", {"tensor_parallel": 2}),
}


@pytest.mark.parametrize(
    "placement", [pytest.param(name, marks=() if name == "tp-2" else pytest.mark.slow) for name in WORLDS]
)
def test_gradients_of_parameters_on_cut_features_are_sums(
    ranks: dict[int, Ranks], tmp_path: Path, placement: str
) -> None:
    world, strategy, options = WORLDS[placement]
    partial = check(ranks, tmp_path, Stack, world, strategy, options=options)
    assert partial == sorted(f"blocks.{i}.{name}" for i in range(2) for name in ON_CUT)


@pytest.mark.parametrize(
    ("module", "missing", "more"),
    [
        (BySequence, {}, {}),
        (Stated, {}, {}),
        (Late, {}, {"late"}),
        (Frozen, {"head_norm.bias", "head_norm.weight"}, {}),
    ],
)
def test_other_ways_to_cut_features(
    ranks: dict[int, Ranks], tmp_path: Path, module: type[TrainModule], missing: set[str], more: set[str]
) -> None:
    partial = check(ranks, tmp_path, module, 2, "tp")
    if module is BySequence:
        assert partial == ["blocks.1.after", "blocks.1.norm.bias", "blocks.1.norm.weight"]
    else:
        assert partial == sorted({f"blocks.{i}.{n}" for i in range(2) for n in ON_CUT if n not in missing} | set(more))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True},
        {"torch_compile": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_recomputed_and_compiled_blocks(ranks: dict[int, Ranks], tmp_path: Path, arguments: dict[str, Any]) -> None:
    partial = check(ranks, tmp_path, Stack, 2, "tp", **arguments)
    assert partial == sorted(f"blocks.{i}.{name}" for i in range(2) for name in ON_CUT)


def refusal(module: type[TrainModule]) -> str:
    try:
        make_fit(module(), rows(), strategy="tp", max_steps=1).train()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_what_can_not_be_summed_is_refused_by_name(ranks: dict[int, Ranks]) -> None:
    both, trespassing = (ranks[2].run(refusal, module=module) for module in (Both, Trespassing))
    assert both == [both[0]] * 2
    assert "blocks.0.scale is used on features that the plan cuts and on whole ones" in both[0]
    assert trespassing == [trespassing[0]] * 2
    assert "'blocks.1.down' takes features that are cut" in trespassing[0]
    assert "'blocks.0.down' gives whole" in trespassing[0]
