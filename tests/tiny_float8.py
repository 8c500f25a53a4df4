"""A model whose layers float8 formats take in part, and its data: ``from tiny_float8 import Deep``."""

from typing import Any

import torch
from stratagem import FitArguments, TrainModule
from tiny import MakeFit
from torch import Tensor, nn

WIDTH = 16


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.gate = nn.Linear(width, 4)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * self.gate(x).mean(dim=-1, keepdim=True)


class Deep(TrainModule):
    """Two blocks, a sibling after them, and an output head whose sizes would qualify."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.last = nn.Linear(width, width)
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.last(x)))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=args.learning_rate, fused=True)


def rows(count: int = 64, width: int = WIDTH) -> list[dict[str, Tensor]]:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(3))
    return [{"x": row, "y": row.flip(0).sin()} for row in x]


def losses(make_fit: MakeFit, precision: Any, **arguments: Any) -> list[float]:
    torch.manual_seed(0)
    defaults = {"max_steps": 20, "logging_steps": 1, "learning_rate": 0.01, "per_device_train_batch_size": 16}
    fit = make_fit(Deep(), rows(), precision=precision, **{**defaults, **arguments})
    fit.train()
    return [log["loss"] for log in fit.state.log_history if "loss" in log]
