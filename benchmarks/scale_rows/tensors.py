"""Row: an update of a model of many small parameters."""

import itertools
import tempfile

import torch
from torch import Tensor, nn

from ... import Fit, TrainModule
from .measuring import Between, measuring

TITLE = "An update of 2,000 small parameters, one process"
ROUNDS = 5
LIMIT = "by hand"
LAYERS, WIDTH, BATCH_SIZE, WARM_UP, UPDATES = 1_000, 8, 4, 3, 15


class Deep(TrainModule):
    """A thousand small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.square().mean()


def stratagem() -> dict[str, float]:
    """A Fit."""
    clock = Between(WARM_UP, UPDATES)
    samples = [{"x": row} for row in torch.randn(BATCH_SIZE * (WARM_UP + UPDATES), WIDTH)]
    with tempfile.TemporaryDirectory() as directory:
        Fit(
            Deep(), samples, callbacks=[clock], max_steps=WARM_UP + UPDATES, output_dir=directory, save_strategy="no",
            per_device_train_batch_size=BATCH_SIZE, optim="adamw_torch_fused",
        ).train()  # fmt: skip
    return clock.figures


def by_hand() -> dict[str, float]:
    """The same loop, written down."""
    module = Deep()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    parameters = list(module.parameters())
    block = measuring(UPDATES)
    for update in itertools.count(1):
        batch = {"x": torch.randn(BATCH_SIZE, WIDTH)}
        module.loss(module(batch["x"]), batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if update == WARM_UP:
            figures = block.__enter__()
        elif update == WARM_UP + UPDATES:
            block.__exit__(None, None, None)
            return figures
    raise AssertionError


CONTESTANTS = {"stratagem": stratagem, "by hand": by_hand}
