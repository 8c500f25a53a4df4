"""Losses over the rows of all ranks: their gradients are those of one big batch, whatever number of rows a rank has."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback, TrainModule
from torch import Tensor, nn
from training import make_fit

FEATURES, SIZE = 5, 8


class Towers(TrainModule):
    """Two encoders of paired samples, whose normalised outputs are to be near each other and far from the rest."""

    pad_to: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.normalize(self.left(left)), nn.functional.normalize(self.right(right))

    def others(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.pad_to is None:
            found = self.gather(rows)
            return found, torch.ones(len(found), dtype=torch.bool)
        return self.gather(rows, pad_to=self.pad_to)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        left, right = outputs
        own = torch.arange(len(left))
        terms = []
        for ours, theirs in ((left, right), (right, left)):
            everyone, are_rows = self.others(theirs)
            logits = (self.scale.exp() * ours @ everyone.T).masked_fill(~are_rows, -torch.inf)
            terms.append(nn.functional.cross_entropy(logits, own))
        return (terms[0] + terms[1]) / 2

    def count_items(self, batch: dict[str, Tensor]) -> int:
        return len(batch["left"])

    def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"left.0": "colwise", "left.2": "rowwise"}


class Sigmoids(Towers):
    """Each pair of samples is judged alone (Zhai et al., 2023)."""

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        left, right = outputs
        everyone, are_rows = self.others(right)
        logits = self.scale.exp() * left @ everyone.T
        signs = 2 * torch.eye(*logits.shape) - 1
        return -(nn.functional.logsigmoid(signs * logits) * are_rows).sum() / len(left)


class Padded(Towers):
    """Where nothing waits for numbers of rows."""

    pad_to = SIZE


def pairs(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {side: torch.randn(FEATURES, generator=generator) for side in ("left", "right")} for _ in range(count)
    ]  # fmt: skip


class Norms(Callback):
    """Whole gradients of the first update, on rank 0."""

    def __init__(self) -> None:
        self.gradients: dict[str, list[float]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        if not self.gradients:
            self.gradients = {name: g.flatten().tolist() for name, g in fit.strategy.full_gradients()}


def train(module: type[TrainModule], count: int, **arguments: Any) -> tuple[dict[str, list[float]], list[float]]:
    """Gradients of the first update, and losses of three."""
    torch.manual_seed(3)
    norms = Norms()
    fit = make_fit(
        module(), pairs(count), max_steps=3, shuffle=False, callbacks=[norms], learning_rate=0.5, max_grad_norm=0.0,
        **arguments,
    )  # fmt: skip
    fit.train()
    return norms.gradients, [log["loss"] for log in fit.state.log_history if "loss" in log]


PLACEMENTS = [(2, "fsdp1", {}), (2, "fsdp2", {}), (4, "fsdp2", {"tensor_parallel": 2})]


@pytest.mark.parametrize(
    ("module", "world", "strategy", "options"),
    [
        *((module, world, "ddp", {}) for module in (Towers, Sigmoids, Padded) for world in (2, 4)),
        *((Towers, *placement) for placement in PLACEMENTS),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradients_are_those_of_one_big_batch(
    ranks: dict[int, Ranks], module: type[TrainModule], world: int, strategy: str, options: dict[str, Any]
) -> None:
    shares = world // options.get("tensor_parallel", 1)
    # The third update of an epoch of 21 has 5 samples: ranks with fewer rows than others, and with none.
    alone = train(module, 21, per_device_train_batch_size=SIZE)
    found = ranks[world].run(
        train, module=module, count=21, strategy=strategy, options=options,
        per_device_train_batch_size=SIZE // shares,
    )  # fmt: skip
    assert found[0][1] == pytest.approx(alone[1], abs=1e-6)
    assert alone[0].keys() == found[0][0].keys()
    for name, gradient in alone[0].items():
        assert found[0][0][name] == pytest.approx(gradient, abs=1e-6)


class InForward(Towers):
    """It gathers where it can't."""

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.gather(left), right)


class InCallback(Callback):
    """It gathers between two updates."""

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        fit.module.gather(torch.zeros(2, 3))


def test_outside_of_a_loss_it_is_refused() -> None:
    with pytest.raises(ValueError, match="gather\\(\\) is called in loss"):
        make_fit(Towers(), pairs(8), max_steps=1, callbacks=[InCallback()]).train()
    with pytest.raises(ValueError, match="gather\\(\\) is called in loss"):
        train(InForward, 8)
    with pytest.raises(ValueError, match="gather\\(\\) is called in loss"):
        Towers().gather(torch.zeros(2, 3))
