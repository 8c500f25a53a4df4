"""A program for these tests: what it builds is counted, and what it draws follows from the run's seed."""

import os
import sys
from typing import Any

import torch
from stratagem import Fit, TrainModule, configure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

print(f"imported by rank {os.environ.get('RANK', 'none')}", file=sys.stderr, flush=True)


class Net(TrainModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Dropout(0.1), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch[1])


def build(width: int = 8, deep: bool = False) -> Net:
    """The module.

    Args:
        width: features of the hidden layer.
        deep: has no effect.
    """
    print(f"built by rank {os.environ.get('RANK', 'none')}", flush=True)
    return Net(width)


def data(rows: int = 64, width: int = 8) -> tuple[TensorDataset, TensorDataset]:
    x = torch.rand(rows, 2)
    y = x.sum(dim=1, keepdim=True) * width
    return TensorDataset(x[8:], y[8:]), TensorDataset(x[:8], y[:8])


def whole(rows: int) -> dict[str, Any]:
    """All that Fit is given."""
    train, held_out = data(rows)
    return {"module": build(), "train_data": train, "eval_data": held_out}


ARGUMENTS = {"max_steps": 6, "learning_rate": 0.01, "logging_steps": 2, "save_steps": 3}


def sample(fit: Fit, /, length: int = 3) -> str:
    return "x" * length


if __name__ == "__main__":
    run = configure(build, data, ARGUMENTS, sample=sample)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    if fit.strategy.is_main:
        print(sample(fit, **run.own["sample"]))
