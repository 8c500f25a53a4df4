"""Dropout on a real GPU, drawn again for each piece. No GPU has run this yet; where there is none it is skipped."""

from typing import Any

import pytest
import torch
from stratagem import TrainModule
from tiny import MakeFit
from torch import Tensor, nn

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none"),
    pytest.mark.slow,
]


class Dropping(TrainModule):
    """Notes what it gives in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 16))
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layers(x)
        self.given.append(outputs.detach().clone())
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs @ outputs.T).logsumexp(dim=0).mean()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_both_forwards_of_a_piece_draw_the_same(make_fit: MakeFit, precision: str) -> None:
    module = Dropping()
    rows = [{"x": torch.randn(16)} for _ in range(24)]
    make_fit(
        module, rows, max_steps=1, per_device_train_batch_size=24, contrastive_chunks=3, precision=precision
    ).train()
    assert len(module.given) == 6
    for first, second in zip(module.given[:3], module.given[3:], strict=True):
        assert first.equal(second)
    assert not module.given[0].equal(module.given[1])
