"""Mixed precision under sharding is autocast's, layer by layer: what a replica computes, to the bit."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import TrainModule
from stratagem.precision import FP16Mixed
from stratagem.precision.products import LARGE, float32_slots
from torch import Tensor, nn
from training import make_fit

UPDATES = 8


class Line(TrainModule):
    """y = a x + b: no product, so that nothing is in 16 bits; a float16 number would overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x[:, :1] + self.b

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])


class Block(nn.Module):
    """A norm, attention, a scale of the block's own, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.scale, self.up = nn.Parameter(torch.full((16,), 0.3)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.scale * self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.up(torch.tanh(x)).exp()


class Kinds(TrainModule):
    """Every kind of layer: convolution, places of the module's own, a tied embedding, a recurrent layer, batch
    statistics.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.places = nn.Parameter(torch.randn(1, 4, 16))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.mix, self.statistics = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.recurrent, self.last = nn.GRU(16, 16, batch_first=True), nn.RMSNorm(16)
        self.read, self.head = nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed((x * 3).long().abs().clamp(max=10)) + self.places
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.statistics(self.mix(hidden.transpose(1, 2))).transpose(1, 2)
        hidden = hidden + self.recurrent(hidden.float())[0]
        return self.head(self.last(self.read(hidden)))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.float().mean(1), batch["y"][:, 0].long() % 11)

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(64, 4, generator=generator) * 2
    return [{"x": row, "y": 300 * row[:1] + 5} for row in x]


def train(
    module: type[TrainModule], precision: str, initial_scale: float = 2.0**16, **arguments: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    if precision == "16-mixed":
        arguments["precision"] = FP16Mixed(initial_scale=initial_scale)
    else:
        arguments["precision"] = precision
    # Not Adam, which makes whole steps of gradients that are nothing but rounding (a bias in front of a norm).
    options = {"max_steps": UPDATES, "shuffle": False, "optim": "sgd", "learning_rate": 0.02, **arguments}
    fit = make_fit(module(), rows(), rows()[:16], **options)
    fit.train()
    logs = [log for log in fit.state.log_history if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "norms": [log["grad_norm"] for log in logs],
        "skipped": fit.state.skipped_updates,
        "eval": fit.evaluate()["eval_loss"],
    }


SHARDED = ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_without_a_product_nothing_is_in_16_bits(ranks: dict[int, Ranks], strategy: str, precision: str) -> None:
    alone = train(Line, precision=precision, per_device_train_batch_size=8)
    exact = train(Line, precision="32-true", per_device_train_batch_size=8)
    assert alone["losses"] == pytest.approx(exact["losses"], rel=1e-6)
    found = ranks[2].run(train, module=Line, strategy=strategy, precision=precision, per_device_train_batch_size=4)
    for result in found:
        assert result["skipped"] == alone["skipped"] == 0
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_kind_of_layer_computes_as_a_replica_does(
    ranks: dict[int, Ranks], strategy: str, precision: str, accumulation: int
) -> None:
    arguments = {
        "module": Kinds,
        "precision": precision,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
    }
    if strategy == "fsdp1" and accumulation > 1:
        # FSDP1's sum over micro-batches may overflow where each alone doesn't, by a hair and not on every processor.
        arguments["initial_scale"] = 2.0**10
    expected = ranks[2].run(train, strategy="ddp", **arguments)
    found = ranks[2].run(train, strategy=strategy, **arguments)
    assert repr(found) == repr([found[0]] * 2)  # a norm that isn't finite is equal to itself, too
    assert found[0]["skipped"] == expected[0]["skipped"]
    assert found[0]["losses"][0] == expected[0]["losses"][0]  # one forward, the same to the bit
    # The norm's sum is in another order, and FSDP1 adds the gradients of micro-batches in 16 bits.
    tolerance = 2**-7 if strategy == "fsdp1" and accumulation > 1 else 1e-5
    assert found[0]["losses"] == pytest.approx(expected[0]["losses"], rel=tolerance)
    assert found[0]["norms"] == pytest.approx(expected[0]["norms"], rel=10 * tolerance, nan_ok=True)
    # On a CPU, evaluation's attention passes autocast by where its weights are float32.
    assert found[0]["eval"] == pytest.approx(expected[0]["eval"], rel=2**-7)


def test_what_is_read_in_16_bits() -> None:
    module = Kinds()
    module.experts = nn.ParameterList([torch.empty(4, 512, 512, device="meta")])  # as large as LARGE
    assert module.experts[0].numel() == LARGE
    kept = float32_slots(module)
    names = {name for name, layer in module.named_modules() for kept_layer, _ in kept if layer is kept_layer}
    blocks = {name for number in range(2) for name in (f"blocks.{number}", f"blocks.{number}.norm")}
    # The head shares the embedding's weight; the module itself holds the places.
    assert names == {"", "embed", "head", "last", "recurrent", "statistics", *blocks}
