"""Models whose backward makes gradients in another order, or others, on each rank, or gradients that share memory."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from ranks import Ranks
from stratagem import TrainModule
from torch import Tensor, nn
from training import train

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
