"""Cached representations on ranks: a micro-batch in pieces has the gradients of the whole, reduced once an update."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import TrainModule
from test_gather import SIZE, Padded, Sigmoids, Towers, train
from torch import Tensor, nn


class WithHead(Towers):
    """The loss uses a layer of the module that forward doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        return super().loss((self.head(outputs[0]), outputs[1]), batch)


CASES = [
    *((module, world, "ddp", {}) for module in (Towers, Sigmoids, Padded, WithHead) for world in (2, 4)),
    *((Towers, *placement) for placement in [(2, "fsdp1", {}), (2, "fsdp2", {}), (4, "fsdp2", {"tensor_parallel": 2})]),
    (WithHead, 2, "fsdp2", {}),
    (WithHead, 2, "fsdp1", {}),
]


@pytest.mark.parametrize(
    ("module", "world", "strategy", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_gradients_are_those_of_one_big_batch(
    ranks: dict[int, Ranks], module: type[TrainModule], world: int, strategy: str, options: dict[str, Any]
) -> None:
    shares = world // options.get("tensor_parallel", 1)
    # In the third update of an epoch of 21 a rank has fewer rows than pieces, and one has none.
    alone = train(module, 21, per_device_train_batch_size=SIZE)
    found = ranks[world].run(
        train, module=module, count=21, strategy=strategy, options=options,
        per_device_train_batch_size=SIZE // shares, contrastive_chunks=3,
    )  # fmt: skip
    assert found[0][1] == pytest.approx(alone[1], rel=1e-6)
    assert alone[0].keys() == found[0][0].keys()
    for name, gradient in alone[0].items():
        assert found[0][0][name] == pytest.approx(gradient, abs=1e-6)
