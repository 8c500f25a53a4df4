"""A module whose layers float8 formats take, cut over two ranks or not, and its data: ``from wide import Deep``."""

import torch
from stratagem import FitArguments, TrainModule
from torch import Tensor, nn

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.gate = nn.Linear(WIDTH, 16)  # 8 of its features are on each of two ranks that cut it
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.down(torch.tanh(self.up(x))) * self.gate(x).mean(dim=-1, keepdim=True)


class Deep(TrainModule):
    """Two blocks, of which the second is built late."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def build(self) -> None:
        self.blocks.append(Block())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.gate": "colwise_gather", "blocks.*.down": "rowwise"}

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=args.learning_rate, eps=1e-4, fused=True)


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))
    return [{"x": row, "y": row.flip(0).sin()} for row in x]
