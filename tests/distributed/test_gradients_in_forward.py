"""Losses that compute gradients themselves, and gradients of those: curves on ranks are those of one device."""

from typing import Any

import pytest
import torch
from ranks import RankFailure, Ranks
from stratagem import TrainModule
from stratagem.strategies.fsdp2.gradients_in_forward import CAN_DIFFERENTIATE_TWICE
from torch import Tensor, nn
from training import Block, curves, make_fit

FEATURES, WIDTH = 3, 6


class Energy(TrainModule):
    """An energy of positions; the loss is of its gradients alone, the forces, which it computes after forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 4 * WIDTH) for _ in range(2))
        self.last = nn.Linear(WIDTH, 1, bias=False)  # forces know no constant

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x.requires_grad_())
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(torch.tanh(hidden))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        (forces,) = torch.autograd.grad(outputs.sum(), batch["x"], create_graph=True)
        return (forces - batch["forces"]).square().mean()

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class InForward(Energy):
    """The forces are of its forward, which goes on with the root's parameters after them."""

    def forward(self, x: Tensor) -> Any:
        (forces,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
        return self.last(self.blocks[0](self.first(forces)))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs - batch["forces"]).square().mean()


class Slopes(Energy):
    """A gradient that no gradient is computed of: the inputs, moved along it, are what is learned from."""

    def forward(self, x: Tensor) -> Any:
        (slopes,) = torch.autograd.grad(super().forward(x).sum(), x)
        return super().forward((x + 0.5 * slopes).detach())

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs - batch["forces"]).square().mean()


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    names = "x", "forces"
    return [{name: torch.rand(FEATURES, generator=generator, dtype=torch.float64) for name in names} for _ in range(32)]


def train(module: str, **arguments: Any) -> dict[str, list[Any]]:
    torch.manual_seed(3)
    sizes = {"max_steps": 4, "precision": "64-true", "gradient_accumulation_steps": 2}
    fit = make_fit(globals()[module](), rows(), **sizes, **arguments)
    fit.train()
    return curves(fit)


@pytest.mark.parametrize("module", [Energy, InForward, Slopes])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tp"])
def test_curves_are_those_of_one_device(ranks: dict[int, Ranks], strategy: str, module: type[Energy]) -> None:
    if strategy == "tp" and not CAN_DIFFERENTIATE_TWICE:
        pytest.skip("this torch has no gradients of gradients through cut layers")
    name, share = module.__name__, 4 if strategy == "tp" else 2
    expected = train(name, per_device_train_batch_size=4)
    for found in ranks[2].run(train, module=name, strategy=strategy, per_device_train_batch_size=share):
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-9)


def test_an_evaluation_leaves_nothing_gathered_behind(ranks: dict[int, Ranks]) -> None:
    for before, after in ranks[2].run(evaluate_between):
        assert before == pytest.approx(after, rel=1e-12)


class Evaluated(InForward):
    """Computes its forces in evaluation, too."""

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return super().forward(x)


def evaluate_between() -> tuple[list[float], list[float]]:
    """The losses of a run, without and with evaluations in it; one would change the other if weights were stale."""
    found = []
    for extras in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        torch.manual_seed(3)
        fit = make_fit(
            Evaluated(), rows(), rows()[:4], strategy="fsdp2", max_steps=3, precision="64-true",
            per_device_train_batch_size=2, **extras,
        )  # fmt: skip
        fit.train()
        found.append(curves(fit)["loss"])
    return found[0], found[1]


class Normed(Energy):
    """With a batch norm on the way of its forces."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(nn.BatchNorm1d(WIDTH))


def test_batch_norm_over_ranks_says_that_it_has_no_gradients_of_gradients(ranks: dict[int, Ranks]) -> None:
    options = {"sync_batchnorm": True}
    with pytest.raises(RankFailure, match="sync_batchnorm's layers have no gradients of gradients"):
        ranks[2].run(train, module="Normed", strategy="ddp", options=options, per_device_train_batch_size=2)


class Classes(Energy):
    """Logits cut by class."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, 4)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(outputs.logsumexp(dim=-1), batch)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {**super().tensor_parallel_plan(), "last": "colwise_gather"}


@pytest.mark.skipif(not CAN_DIFFERENTIATE_TWICE, reason="this torch can't in tensor parallelism at all")
def test_loss_parallelism_says_that_it_has_no_gradients_of_gradients(ranks: dict[int, Ranks]) -> None:
    options = {"tensor_parallel": 2, "loss_parallel": True}
    with pytest.raises(RankFailure, match="loss_parallel=True: the cross entropy of classes that are cut has no grad"):
        ranks[2].run(
            train, module="Classes", strategy="fsdp2", options=options, per_device_train_batch_size=4, seconds=60.0
        )
