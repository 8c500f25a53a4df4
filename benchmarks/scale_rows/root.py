"""Row: the memory of an update whose embedding and head are most of the model."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ... import Fit, TrainModule
from ..two_ranks import on_two_ranks
from .measuring import PEAK, Between, measuring

TITLE = "An update of an embedding and a head of 128 MiB each under FSDP2, 2 ranks: memory beyond that before it"
ROUNDS = 3
LIMIT = "by hand, units of their own"
ROWS, WIDTH, LENGTH, WARM_UP, UPDATES = 2**17, 256, 8, 1, 3


class Model(TrainModule):
    """Small blocks between a large embedding and a large head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8))
        self.head = nn.Linear(WIDTH, ROWS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.float().square().mean()

    def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit_on_rank() -> dict[str, float]:
    """A Fit."""
    clock, steps = Between(WARM_UP, UPDATES), WARM_UP + UPDATES
    samples = [{"tokens": torch.arange(LENGTH)}] * 2 * steps
    fit = Fit(
        Model(), samples, strategy="fsdp2", callbacks=[clock], max_steps=steps, per_device_train_batch_size=1,
        max_grad_norm=0, output_dir=os.getcwd(), save_strategy="no", progress=False, loggers=(), report=False,
    )  # fmt: skip
    fit.train()
    fit.close()
    return figures_of(clock.figures)


def by_hand(around: bool) -> dict[str, float]:
    """The same loop by torch's means.

    Args:
        around: whether the embedding and the head are units of their own, as torchtitan has them.
    """
    dist.init_process_group("gloo", init_method="env://", rank=int(os.environ["RANK"]))
    module = Model()
    for layer in module.blocks:
        fully_shard(layer)
    if around:
        fully_shard(module.embed)
        fully_shard(module.head, reshard_after_forward=False)
    fully_shard(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    block = measuring(UPDATES)
    for update in range(1, WARM_UP + UPDATES + 1):
        module.loss(module(torch.arange(LENGTH)[None]), None).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update == WARM_UP:
            figures = block.__enter__()
    block.__exit__(None, None, None)
    dist.destroy_process_group()
    return figures_of(figures)


def figures_of(measured: dict[str, float]) -> dict[str, float]:
    """Memory first."""
    return {PEAK: measured.pop(PEAK), **measured}


def units_on_rank() -> dict[str, float]:
    """Units of their own."""
    return by_hand(around=True)


def root_on_rank() -> dict[str, float]:
    """All in the root."""
    return by_hand(around=False)


CONTESTANTS = {
    "stratagem": lambda: on_two_ranks(fit_on_rank),
    "by hand, units of their own": lambda: on_two_ranks(units_on_rank),
    "by hand, in the root": lambda: on_two_ranks(root_on_rank),
}
