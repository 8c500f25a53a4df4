"""Models whose backward makes gradients in another order, or others, on each rank, or gradients that share memory."""

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from ranks import RankFailure, Ranks
from stratagem import TrainModule
from torch import Tensor, nn
from training import make_fit, train

pytestmark = pytest.mark.slow
SAMPLES, WIDTH = 7, 6  # at the end of an epoch one rank has two rows, and the other has one
SMALL_BUCKETS = {"stage": "auto", "reduce_bucket_size": 2 * WIDTH * WIDTH}  # for fewer than all parameters


class Regression(TrainModule):
    """Vectors to vectors."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (outputs - batch["y"]).square().mean()


class TwoBiases(Regression):
    """One gradient for two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.one, self.other = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + self.one + self.other)


class Packed(Regression):
    """Rows of one to four steps, through a recurrent layer that makes gradients in another order for one row alone."""

    kind: type[nn.Module] = nn.LSTM

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = self.kind(1, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0].abs() * 10).long() % 4
        packed = nn.utils.rnn.pack_padded_sequence(x[:, :4, None], lengths.cpu(), True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.head(states.sum(dim=1))


class PackedGRU(Packed):
    """The same by nn.GRU."""

    kind = nn.GRU


class PackedRNN(Packed):
    """The same by nn.RNN."""

    kind = nn.RNN


class Swapping(Regression):
    """Matrices of one shape, read in one order (stage 3 gathers them there) and used in one that follows from the
    batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        order = list(range(4)) if x[0, 0] > 0 else [2, 0, 3, 1]
        matrices = list(self.matrices)
        parts = {number: x @ matrices[number] for number in order}
        return self.head(torch.tanh(parts[0]) * parts[1] + torch.tanh(parts[2] - parts[3]))


class Routed(Regression):
    """Each row goes through one of two layers: a rank whose rows all go the same way doesn't use the other."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for way, taken in zip(self.ways, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            if taken.any():
                out[taken] = way(x[taken])
        return self.head(torch.tanh(out))


class RoutedWithin(Routed):
    """The same, with both layers in one unit."""

    def shard_units(self) -> list[nn.Module]:
        return []


class Idle(Regression):
    """Six layers, and one that is registered last and never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.held: list[int] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.layers[0](x)
        out.register_hook(lambda _: self.held.append(sum(p.grad is not None for p in self.parameters())))
        return self.layers[1:](out)


def gradients_held(stage: int) -> list[int]:
    """How many whole gradients there are when each backward reaches the first layer."""
    options = {"stage": stage, "config": {"zero_optimization": SMALL_BUCKETS}}
    fit = make_fit(Idle(), rows(), strategy="deepspeed", options=options, per_device_train_batch_size=2, **RUN)
    fit.train()
    return fit.module.held  # type: ignore[return-value]


def rows() -> list[dict[str, Tensor]]:
    """Vectors, half of them with a first element above 0."""
    draw = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(WIDTH, generator=draw), "y": torch.randn(WIDTH, generator=draw)} for _ in range(SAMPLES)]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two ranks of their own: the other tests' ranks never import DeepSpeed."""
    ranks = Ranks(2)
    yield ranks
    ranks.end()


MODULES = [TwoBiases, Packed, PackedGRU, PackedRNN, Swapping]
PLACEMENTS = ["ddp", "fsdp1", "fsdp2", *(f"deepspeed_stage_{stage}" for stage in range(4))]
RUN = {"max_steps": 6, "shuffle": False}


def check(ranks: Ranks, module: type[TrainModule], strategy: str, **arguments: object) -> None:
    """Losses and norms are those of one device."""
    if "deepspeed" in strategy and find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    given = {"module": module, "data": rows(), **RUN, **arguments}
    expected = train(**{**given, "options": None}, per_device_train_batch_size=4)  # type: ignore[arg-type]
    found = ranks.run(train, strategy=strategy, per_device_train_batch_size=2, **given)
    assert found[0] == found[1]
    for key in ("loss", "grad_norm"):
        assert found[0][key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("strategy", PLACEMENTS)
@pytest.mark.parametrize("module", MODULES)
def test_the_order_of_gradients_makes_no_difference(two_ranks: Ranks, module: type[TrainModule], strategy: str) -> None:
    check(two_ranks, module, strategy)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_sums_a_gradient_that_one_rank_has(two_ranks: Ranks, stage: int, accumulation: int) -> None:
    check(two_ranks, Routed, f"deepspeed_stage_{stage}", gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize(
    "options", [{}, {"offload_optimizer": True}, {"config": {"zero_optimization": SMALL_BUCKETS}}], ids=str
)
@pytest.mark.parametrize("module", [Swapping, Routed])
def test_zero_2_fills_buckets_alike(two_ranks: Ranks, module: type[TrainModule], options: dict[str, object]) -> None:
    check(two_ranks, module, "deepspeed", options={"stage": 2, **options})


@pytest.mark.parametrize("options", [{"stage": "auto", "reduce_scatter": False}, SMALL_BUCKETS], ids=str)
def test_zero_3_fills_buckets_alike(two_ranks: Ranks, options: dict[str, object]) -> None:
    check(two_ranks, Swapping, "deepspeed", options={"stage": 3, "config": {"zero_optimization": options}})


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_do_not_wait_for_one_that_never_comes(two_ranks: Ranks, stage: int) -> None:
    first, *others = two_ranks.run(gradients_held, stage=stage)[0]
    assert len(others) == RUN["max_steps"] - 1
    most = {2: 6, 3: 4}[stage]  # of ten: what a bucket holds, and at stage 2 the rank's own share
    assert max(others) <= most
    assert stage == 2 or first <= most


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("strategy", "options"), [("fsdp1", {}), ("fsdp2", {"find_unused_parameters": True})], ids=["fsdp1", "fsdp2"]
)
def test_fsdp_sums_a_gradient_that_one_rank_has(
    two_ranks: Ranks, strategy: str, options: dict[str, object], accumulation: int
) -> None:
    check(two_ranks, RoutedWithin, strategy, options=options, gradient_accumulation_steps=accumulation)


class EitherWay(RoutedWithin):
    """Each batch goes one of two ways: the matrices are equally large, so that torch finds nothing amiss."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.ways[int(x[0, 0] > 0)](x)))


def train_with_patience(limit: float, **arguments: Any) -> None:
    """A run whose ranks wait only so many seconds for one another to find the same change."""
    from stratagem.strategies.fsdp2 import used_parameters

    used_parameters.SECONDS = limit
    train(**arguments)


@pytest.mark.parametrize("module", [EitherWay, RoutedWithin])
def test_fsdp2_names_what_one_rank_does_not_reach(module: type[TrainModule]) -> None:
    ranks, began = Ranks(2), time.monotonic()
    says = r"did not reach ways\.[01]\.weight, ways\.[01]\.bias.*find_unused_parameters=True"
    given = {"strategy": "fsdp2", "per_device_train_batch_size": 2, **RUN}
    with pytest.raises(RankFailure, match=says):  # the ranks end when one of them has failed
        ranks.run(train_with_patience, limit=2.0, seconds=60.0, module=module, data=rows(), **given)
    assert time.monotonic() - began < 40


def test_fsdp2_leaves_alone_what_no_rank_reaches(two_ranks: Ranks) -> None:
    check(two_ranks, Idle, "fsdp2")
