"""Samples of about the same length are put together, in one order for any number of ranks; a resume goes on in it."""

import itertools
from typing import Any

import pytest
import torch
from stratagem import TrainModule
from stratagem.framework.data.lengths import LengthGroups
from stratagem.framework.data.mapped import MapStream
from stratagem.framework.data.stream import LoaderOptions
from tiny import MakeFit, NumberStream, Regressor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def batched(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


LENGTHS = [(i * 37) % 101 + 1 for i in range(120)]


class Texts(Dataset):
    """Samples that are their own index, each with a length."""

    def __init__(self, lengths: list[int]) -> None:
        self.length = lengths

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, index: int) -> int:
        return index


def stream(rank: int = 0, size: int = 1, per_rank: int = 4, update: int = 4) -> MapStream:
    data = Texts(LENGTHS)
    options = LoaderOptions(per_rank, True, False, list, {"num_workers": 0})
    return MapStream(data, options, 7, rank, size, LengthGroups(data, "length", update))


def test_every_sample_once_with_its_like_and_the_longest_first() -> None:
    groups = stream()
    for epoch in (0, 1):
        order = list(itertools.chain(*groups.epoch(epoch)))
        assert sorted(order) == list(range(120))
        assert LENGTHS[order[0]] == max(LENGTHS)
        # Padding: in a batch, all samples are as long as its longest. 120 of 4 an update: groups of 7 updates' samples.
        waste = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batched(order, 4)) - sum(LENGTHS)
        assert waste < 0.25 * random_waste()
    assert list(groups.epoch(0)) != list(groups.epoch(1))


def random_waste() -> int:
    drawn = torch.randperm(120, generator=torch.Generator().manual_seed(0)).tolist()
    return sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batched(drawn, 4)) - sum(LENGTHS)


def test_groups_are_drawn_then_sorted() -> None:
    # As transformers does: 120 samples, 4 an update: 120 // 16 = 7 updates are a group of 28.
    order = list(itertools.chain(*stream().epoch(3)))
    drawn = torch.randperm(120, generator=torch.Generator().manual_seed(7 + 3)).tolist()
    expected = []
    for start in range(0, 120, 28):
        expected += sorted(drawn[start : start + 28], key=lambda i: -LENGTHS[i])
    longest = max(range(0, 120, 28), key=lambda start: LENGTHS[expected[start]])
    expected[0], expected[longest] = expected[longest], expected[0]
    assert order == expected


def test_the_order_is_one_for_any_number_of_ranks() -> None:
    whole = [sorted(batch) for batch in stream(per_rank=4).epoch(0)]
    halves = [stream(rank, 2, per_rank=2).epoch(0) for rank in range(2)]
    assert [sorted(first + second) for first, second in zip(*halves, strict=True)] == whole


def test_a_resume_goes_on_in_the_order_whatever_an_update_holds() -> None:
    through = stream()
    batches = through.epoch(0)
    seen = list(itertools.chain(*(next(batches) for _ in range(5))))
    other = stream(per_rank=10, update=20)
    other.load_state_dict(through.state_dict())
    rest = list(itertools.chain(*other.epoch(0)))
    assert [*seen, *rest] == list(itertools.chain(*stream().epoch(0)))
    assert list(other.epoch(1)) == list(stream(per_rank=10, update=20).epoch(1))  # the next one in its own


class Ragged(TrainModule):
    """A mean over tokens, of one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 1)
        self.seen: list[int] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen.append(input_ids.shape[1])
        return self.embed(input_ids).mean()

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square()


def test_the_length_of_input_ids_is_taken_where_nothing_else_is_there(make_fit: MakeFit) -> None:
    rows = [{"input_ids": torch.zeros(length, dtype=torch.long)} for length in (3, 9, 1, 7, 5)]
    module = Ragged()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5, "num_train_epochs": 1}
    make_fit(module, rows, shuffle=True, train_sampling_strategy="group_by_length", **options).train()
    assert module.seen == [9, 7, 5, 3, 1]
    module.seen = []
    named = [{**row, "size": -len(row["input_ids"])} for row in rows]
    make_fit(
        module, named, shuffle=True, train_sampling_strategy="group_by_length", length_column_name="size", **options
    ).train()
    assert module.seen == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [{"x": torch.ones(3)}],
            r"needs lengths, and a sample of train_data has the keys x\. Give the data an attribute",
        ),
        ([torch.ones(3)], "a sample of train_data has Tensor"),
        (NumberStream(4), "Received: train_data, a NumberStream"),
        (DataLoader(Texts([1, 2])), "Received: train_data, a DataLoader"),
    ],
    ids=["keys", "tensors", "stream", "loader"],
)
def test_data_that_cant_be_grouped_is_refused(make_fit: MakeFit, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_fit(Regressor(), data, max_steps=1, shuffle=True, train_sampling_strategy="group_by_length")


def test_sequential_is_the_order_of_the_data(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), Texts([1] * 6), max_steps=1, train_sampling_strategy="sequential", shuffle=True)
    assert [i for batch in fit.get_train_dataloader().epoch(0) for i in batch.tolist()] == list(range(6))
