"""Cached representations on ranks: a micro-batch in pieces has the gradients of the whole, reduced once an update."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback, TrainModule
from test_collectives import BLOCK, HALVES, ROOT, listen, update
from test_context_parallel import TOLERANCE, Writer, single, text_rows, train_on_ranks
from test_gather import FEATURES, SIZE, Padded, Sigmoids, Towers, pairs, train
from test_root_units import run
from torch import Tensor, nn
from training import make_fit


class WithHead(Towers):
    """The loss uses a layer of the module that forward doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        return super().loss((self.head(outputs[0]), outputs[1]), batch)


PLACEMENTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "ddp", {}),
    (2, "fsdp1", {}),
    (2, "fsdp2", {}),
    (4, "fsdp2", {"tensor_parallel": 2}),
]
CASES = [
    *((module, world, "ddp", {}) for module in (Towers, Sigmoids, Padded) for world in (2, 4)),
    *((WithHead, *placement) for placement in PLACEMENTS),
]


@pytest.mark.parametrize(
    ("module", "world", "strategy", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_gradients_are_those_of_one_big_batch(
    ranks: dict[int, Ranks], module: type[TrainModule], world: int, strategy: str, options: dict[str, Any]
) -> None:
    shares = world // options.get("tensor_parallel", 1)
    # In the third update of an epoch of 21 a rank has fewer rows than pieces, and one of four has none.
    alone = train(module, 21, per_device_train_batch_size=SIZE)
    found = ranks[world].run(
        train, module=module, count=21, strategy=strategy, options=options,
        per_device_train_batch_size=SIZE // shares, contrastive_chunks=3,
    )  # fmt: skip
    assert found[0][1] == pytest.approx(alone[1], rel=1e-6)
    assert alone[0].keys() == found[0][0].keys()
    for name, gradient in alone[0].items():
        assert found[0][0][name] == pytest.approx(gradient, abs=1e-6, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["HeadInLoss", "HeadInLossAlone"])
def test_a_large_layer_that_is_gathered_for_the_loss(ranks: dict[int, Ranks], module: str) -> None:
    expected = run(module)["curve"]
    for found in ranks[2].run(run, module=module, strategy="fsdp2", contrastive_chunks=2):
        assert found["curve"] == pytest.approx(expected, rel=1e-5)


class Dropping(Towers):
    """With dropout. It notes which samples a rank has in each loss."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)
        self.samples: list[list[int]] = []

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.drop(left), self.drop(right))

    def loss(self, outputs: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        self.samples.append(batch["index"].tolist())
        return super().loss(outputs, batch)


class Seeded(Callback):
    """Has each rank begin an update with random numbers of its own, and keeps the first update's gradients."""

    def __init__(self) -> None:
        self.gradients: dict[str, list[float]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        torch.manual_seed(100 + fit.strategy.rank)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        self.gradients = {name: g.flatten().tolist() for name, g in fit.strategy.full_gradients()}


def numbered(count: int) -> list[dict[str, Any]]:
    return [{**row, "index": index} for index, row in enumerate(pairs(count))]


def train_dropping(count: int, **arguments: Any) -> tuple[dict[str, list[float]], list[list[int]]]:
    """Gradients of one update, and the samples of each micro-batch of this rank."""
    torch.manual_seed(3)
    kept, module = Seeded(), Dropping()
    make_fit(
        module, numbered(count), max_steps=1, shuffle=False, callbacks=[kept], max_grad_norm=0.0, **arguments
    ).train()
    return kept.gradients, module.samples


def by_hand(samples: list[list[list[int]]], pieces: int, count: int) -> dict[str, list[float]]:
    """One process does what all ranks do: each rank's pieces with the masks that it draws, and InfoNCE over all rows of
    a micro-batch, whose mean weighs as many as they are.

    Args:
        samples: by rank and micro-batch.
        pieces: of a micro-batch on a rank.
        count: samples in the update.
    """
    torch.manual_seed(3)
    module, rows = Dropping(), pairs(count)
    generators = [torch.Generator().manual_seed(100 + rank).get_state() for rank in range(len(samples))]
    for micro_batch in range(len(samples[0])):
        lefts, rights = [], []
        for rank, of_rank in enumerate(samples):
            torch.set_rng_state(generators[rank])
            chosen = [rows[index] for index in of_rank[micro_batch]]
            for part in torch.arange(len(chosen)).tensor_split(pieces):
                if len(part):
                    left, right = module(
                        torch.stack([chosen[i]["left"] for i in part]), torch.stack([chosen[i]["right"] for i in part])
                    )
                    lefts.append(left)
                    rights.append(right)
            generators[rank] = torch.get_rng_state()
        logits = module.scale.exp() * torch.cat(lefts) @ torch.cat(rights).T
        own = torch.arange(len(logits))
        cross_entropy = nn.functional.cross_entropy
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        (loss * len(logits) / count).backward()
    return {name: p.grad.flatten().tolist() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("world", "strategy", "pieces", "accumulation"),
    [
        *((world, "ddp", pieces, 2) for world in (2, 4) for pieces in (None, 2)),
        *((2, strategy, 2, accumulation) for strategy in ("fsdp1", "fsdp2") for accumulation in (1, 2)),
    ],
)
def test_each_micro_batch_is_gathered_by_itself_with_the_masks_of_each_rank(
    ranks: dict[int, Ranks], world: int, strategy: str, pieces: int | None, accumulation: int
) -> None:
    count = 4 * world * accumulation - 1  # the last micro-batch has unequal numbers of rows
    found = ranks[world].run(
        train_dropping, count=count, strategy=strategy, per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation, contrastive_chunks=pieces,
    )  # fmt: skip
    samples = [of_rank for _, of_rank in found]
    assert sorted(i for of_rank in samples for part in of_rank for i in part) == list(range(count))
    expected = by_hand(samples, pieces or 1, count)
    assert found[0][0].keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[0][0][name] == pytest.approx(gradient, abs=1e-6)


class Normalizing(Towers):
    """With batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.norm(left), right)


def train_normalizing(strategy: str) -> tuple[list[float], list[float]]:
    torch.manual_seed(3)
    module = Normalizing()
    make_fit(
        module, pairs(8), max_steps=1, shuffle=False, strategy=strategy, options={"sync_batchnorm": True},
        per_device_train_batch_size=4, contrastive_chunks=2,
    ).train()  # fmt: skip
    return module.norm.running_mean.tolist(), [module.norm.num_batches_tracked.item()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_joint_statistics_of_a_piece_are_those_of_the_ranks_pieces(ranks: dict[int, Ranks], strategy: str) -> None:
    found = ranks[2].run(train_normalizing, strategy=strategy)
    assert found[0] == found[1]
    assert found[0][1] == [2.0]  # pieces; the second forward of each isn't counted
    # The first four samples are on rank 0, and a piece has two of each rank's.
    lefts = torch.stack([row["left"] for row in pairs(8)])
    expected = 0.9 * 0.1 * lefts[[0, 1, 4, 5]].mean(0) + 0.1 * lefts[[2, 3, 6, 7]].mean(0)
    torch.testing.assert_close(torch.tensor(found[0][0]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["context-2", "context-2-tensor-2"])
def test_ranks_that_share_samples_cut_them_alike(ranks: dict[int, Ranks], placement: str) -> None:
    expected, _ = single()
    found = train_on_ranks(ranks, placement, contrastive_chunks=3)
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)


class DroppingWriter(Writer):
    """With dropout on the features that a rank holds. It notes what it gives in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        for block in self.blocks:
            block.up = nn.Sequential(block.up, nn.Dropout(0.3))

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        outputs = super().forward(tokens, positions)
        self.given.append(outputs.detach().clone())
        return outputs

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up.0": "colwise", "blocks.*.down": "rowwise"}


def compare_forwards(strategy: str, options: dict[str, Any]) -> list[bool]:
    """Which of an update's four forwards gave the same: the first piece's two, the second's two, and both pieces'."""
    module = DroppingWriter()
    make_fit(
        module, text_rows(8), max_steps=1, strategy=strategy, options=options, per_device_train_batch_size=8,
        contrastive_chunks=2,
    ).train()  # fmt: skip
    first, second, first_again, second_again = module.given
    return [first.equal(first_again), second.equal(second_again), first.equal(second)]


@pytest.mark.parametrize(
    ("strategy", "options"), [("tp", {}), ("fsdp2", {"context_parallel": 2})], ids=["tp", "context"]
)
def test_ranks_that_share_samples_draw_the_same_again(
    ranks: dict[int, Ranks], strategy: str, options: dict[str, Any]
) -> None:
    assert ranks[2].run(compare_forwards, strategy=strategy, options=options) == [[True, True, False]] * 2


@pytest.mark.parametrize("accumulation", [1, 4])
def test_ddp_reduces_once_an_update(ranks: dict[int, Ranks], accumulation: int) -> None:
    arguments = {"strategy": "ddp", "gradient_accumulation_steps": accumulation, "contrastive_chunks": 2}
    for messages in ranks[2].run(listen, **arguments):
        assert update(messages) == {("allreduce", "float32", 2 * BLOCK + ROOT): 1}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_fsdp2_reduces_each_group_once_an_update(ranks: dict[int, Ranks], accumulation: int) -> None:
    arguments = {"strategy": "fsdp2", "gradient_accumulation_steps": accumulation, "contrastive_chunks": 2}
    for messages in ranks[2].run(listen, **arguments):
        sent = update(messages)
        reduced = {("reduce_scatter_base", "float32", numbers): times for numbers, times in HALVES.items()}
        assert {message: times for message, times in sent.items() if message[0] == "reduce_scatter_base"} == reduced
