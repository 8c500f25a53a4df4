"""Batches: one order that the seed decides, shared among ranks without loss or repetition, resumable at any sample."""

import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem import FitArguments
from stratagem.framework import random_state
from stratagem.framework.data import DataStream, make_stream
from stratagem.framework.data.mapped import MapStream
from stratagem.framework.data.reread import IterableStream, LoaderStream
from stratagem.framework.data.shares import Shares
from stratagem.framework.data.stand_in import StandIn
from stratagem.framework.data.stream import LoaderOptions, batch_seed
from stratagem.framework.data.worker_starts import WorkerStarts
from stratagem.framework.random_state import OwnRandomState
from stratagem.strategies import Strategy
from tiny import MakeFit, NoisyRows, Numbers, NumberStream, Regressor, RowStream
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

CPU = torch.device("cpu")
# (ranks, micro-batch size, accumulation) of one global batch of 8.
SPLITS = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 4, 1), (2, 2, 2), (2, 1, 4), (4, 2, 1), (4, 1, 2)]


def stream_of(data: Any, rank: int = 0, size: int = 1, training: bool = True, **arguments: Any) -> DataStream:
    strategy = Strategy()
    strategy.data_rank, strategy.data_size = rank, size
    return make_stream(data, FitArguments(**arguments), strategy, training=training)


def flat(parts: Iterable[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


def samples_of(batch: Any) -> list[int]:
    """The samples in a batch of numbers that count: none of a stand-in."""
    return [] if isinstance(batch, StandIn) else batch.tolist()


def updates_of_rank(stream: DataStream, accumulation: int, epoch: int = 0) -> list[list[int]]:
    batches = [samples_of(batch) for batch in stream.epoch(epoch)]
    return [flat(batches[i : i + accumulation]) for i in range(0, len(batches), accumulation)]


def updates_over_ranks(
    make: Callable[[int], DataStream], size: int, accumulation: int, epoch: int = 0
) -> list[list[int]]:
    """The samples of each update over all ranks, sorted; every rank has as many batches as the others."""
    by_rank = [updates_of_rank(make(rank), accumulation, epoch) for rank in range(size)]
    assert len({len(updates) for updates in by_rank}) == 1
    return [sorted(flat(update)) for update in zip(*by_rank, strict=True)]


# The order.


def test_the_order_depends_on_the_seed_alone() -> None:
    def order(seed: int, global_seed: int, **arguments: Any) -> list[int]:
        random.seed(global_seed)
        numpy.random.seed(global_seed)
        torch.manual_seed(global_seed)
        return [n for batch in stream_of(Numbers(50), seed=seed, **arguments).epoch(3) for n in batch.tolist()]

    expected = order(1, 1)
    assert sorted(expected) == list(range(50))
    assert expected != list(range(50))
    assert order(1, 2) == expected
    assert order(1, 1, per_device_train_batch_size=3) == expected
    assert order(1, 1, dataloader_num_workers=2) == expected
    assert order(99, 1, data_seed=1) == expected
    assert order(2, 1) != expected


def test_making_batches_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert len(list(stream_of(Numbers(20)).epoch(0))) == 3
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_each_epoch_has_an_order_of_its_own_and_every_sample_once() -> None:
    stream = stream_of(Numbers(50))
    epochs = [[n for batch in stream.epoch(e) for n in batch.tolist()] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = stream_of(Numbers(50))
    assert [n for batch in again.epoch(2) for n in batch.tolist()] == epochs[2]


def test_without_shuffling_the_order_is_the_datas() -> None:
    for stream in (stream_of(Numbers(10), shuffle=False), stream_of(Numbers(10), training=False)):
        assert [n for batch in stream.epoch(1) for n in batch.tolist()] == list(range(10))


# Shares.


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("total", [37, 32, 33, 3])
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_global_batch_holds_the_same_samples_however_it_is_split(
    kind: str, total: int, split: tuple[int, int, int]
) -> None:
    size, batch, accumulation = split

    def make(size: int, batch: int) -> Callable[[int], DataStream]:
        data: Dataset = Numbers(total) if kind == "map" else NumberStream(total)
        return lambda rank: stream_of(data, rank, size, per_device_train_batch_size=batch)

    alone = updates_over_ranks(make(1, 8), 1, 1, epoch=2)
    assert [len(update) for update in alone] == [8] * (total // 8) + ([total % 8] if total % 8 else [])
    assert updates_over_ranks(make(size, batch), size, accumulation, epoch=2) == alone


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("total", range(1, 18))
def test_a_short_end_gives_each_rank_a_batch_and_no_sample_twice(kind: str, total: int) -> None:
    size, batch = 4, 2
    data: Dataset = Numbers(total) if kind == "map" else NumberStream(total)
    ranks = [
        list(stream_of(data, rank, size, per_device_train_batch_size=batch, shuffle=False).epoch(0))
        for rank in range(size)
    ]
    assert {len(batches) for batches in ranks} == {-(-total // 8)}
    seen = Counter(n for batches in ranks for b in batches for n in samples_of(b))
    assert seen == Counter(range(total))
    left = total % 8
    # An even part of what is left for each, so that no rank computes much longer than another.
    shares = [samples_of(batches[-1]) for batches in ranks]
    if left:
        part = -(-left // size)
        rest = list(range(total - left, total))
        assert shares == [rest[r * part : (r + 1) * part] for r in range(size)]
    for batches in ranks:
        for b in batches:
            if isinstance(b, StandIn):
                assert len(b.batch) == 1  # the stand-in is a sample that another rank counts


def test_drop_last_over_ranks_leaves_out_the_short_global_micro_batch() -> None:
    for data in (Numbers(23), NumberStream(23)):
        arguments = {"per_device_train_batch_size": 3, "dataloader_drop_last": True, "shuffle": False}
        ranks = [[samples_of(b) for b in stream_of(data, r, 2, **arguments).epoch(0)] for r in range(2)]
        assert ranks == [[[0, 1, 2], [6, 7, 8], [12, 13, 14]], [[3, 4, 5], [9, 10, 11], [15, 16, 17]]]


@pytest.mark.parametrize(("size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_a_ready_loader_gives_ranks_its_batches_in_turn(size: int, accumulation: int) -> None:
    def make(rank: int) -> DataStream:
        sampler = BatchSampler(SequentialSampler(Numbers(21)), 2, drop_last=False)
        sampler_of_its_own = type("Own", (BatchSampler,), {})(sampler.sampler, 2, False)
        return stream_of(DataLoader(Numbers(21), batch_sampler=sampler_of_its_own), rank, size)

    assert isinstance(make(0), LoaderStream)
    # 11 batches: 8 + 8 + 5 samples.
    expected = [list(range(8)), list(range(8, 16)), list(range(16, 21))]
    assert updates_over_ranks(make, size, accumulation) == expected


def test_a_rank_without_a_batch_of_a_ready_loader_gets_a_stand_in() -> None:
    def make(rank: int) -> DataStream:
        sampler = WeightedRandomSampler([1.0] * 10, 10, generator=torch.Generator().manual_seed(4))
        return stream_of(DataLoader(Numbers(10), batch_size=4, sampler=sampler), rank, 2)

    first, second = (list(make(rank).epoch(0)) for rank in range(2))
    assert [type(batch) for batch in first] == [Tensor, Tensor]
    assert [type(batch) for batch in second] == [Tensor, StandIn]
    torch.testing.assert_close(second[1].batch, first[1], rtol=0, atol=0)
    assert [len(make(rank)) for rank in range(2)] == [2, 2]


# Ready loaders.


def test_a_ready_loader_that_shuffles_keeps_its_options_and_gets_our_order() -> None:
    def doubled(samples: list[int]) -> Tensor:
        return 2 * torch.tensor(samples)

    loader = DataLoader(Numbers(10), batch_size=3, shuffle=True, collate_fn=doubled)
    stream = stream_of(loader, seed=4, per_device_train_batch_size=5, shuffle=False)
    assert isinstance(stream, MapStream)
    batches = [batch.tolist() for batch in stream.epoch(0)]
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    order = flat(batches)
    assert sorted(order) == [2 * n for n in range(10)]
    ours = stream_of(Numbers(10), seed=4)
    assert order == [2 * n for batch in ours.epoch(0) for n in batch.tolist()]


def test_a_ready_loader_in_order_stays_in_order_whatever_shuffle_says() -> None:
    stream = stream_of(DataLoader(Numbers(5), batch_size=2), shuffle=True)
    assert [batch.tolist() for batch in stream.epoch(0)] == [[0, 1], [2, 3], [4]]


def test_a_ready_loader_that_drops_its_last_batch_does() -> None:
    stream = stream_of(DataLoader(Numbers(5), batch_size=2, drop_last=True))
    assert [batch.tolist() for batch in stream.epoch(0)] == [[0, 1], [2, 3]]
    assert len(stream) == 2


def test_a_custom_batch_sampler_is_taken_as_it_is() -> None:
    loader = DataLoader(Numbers(6), batch_sampler=[[5, 4, 3], [0], [1, 2]])
    stream = stream_of(loader)
    assert isinstance(stream, LoaderStream)
    for epoch in range(2):
        assert [batch.tolist() for batch in stream.epoch(epoch)] == [[5, 4, 3], [0], [1, 2]]
    assert len(stream) == 3


def test_a_ready_loader_over_an_iterable_keeps_its_batch_size() -> None:
    stream = stream_of(DataLoader(NumberStream(5), batch_size=2), per_device_train_batch_size=4)
    assert isinstance(stream, IterableStream)
    assert [batch.tolist() for batch in stream.epoch(0)] == [[0, 1], [2, 3], [4]]


def test_a_loader_whose_dataset_batches_itself_is_taken_as_it_is() -> None:
    class Batches(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter([torch.arange(3), torch.arange(3, 5)])

    stream = stream_of(DataLoader(Batches(), batch_size=None))
    assert [batch.tolist() for batch in stream.epoch(0)] == [[0, 1, 2], [3, 4]]


def test_samplers_and_datasets_are_told_the_epoch() -> None:
    class Told(NumberStream):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class ToldSampler(SequentialSampler):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    stream, sampler = stream_of(Told(4)), ToldSampler(Numbers(4))
    ready = stream_of(DataLoader(Numbers(4), batch_size=2, sampler=sampler))
    for epoch in (0, 1, 5):
        list(stream.epoch(epoch))
        list(ready.epoch(epoch))
    assert Told.epochs == [0, 1, 5]
    assert sampler.epochs == [0, 1, 5]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_a_distributed_samplers_share_is_not_shared_again(size: int, shuffle: bool) -> None:
    def make(rank: int) -> DataStream:
        sampler = DistributedSampler(Numbers(13), num_replicas=size, rank=rank, shuffle=shuffle)
        return stream_of(DataLoader(Numbers(13), batch_size=4 // size, sampler=sampler), rank, size)

    seen = flat(updates_over_ranks(make, size, 1))
    assert sorted(seen) == list(range(13))  # each sample once: the sampler alone would repeat one for two ranks
    assert (seen == list(range(13))) != shuffle


class ByEpoch(Dataset):
    """Rows that depend on the epoch that the dataset was told of, and on random numbers."""

    def __init__(self) -> None:
        self.epoch, self.told = -1, []  # type: ignore[var-annotated]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.tensor([float(index), float(self.epoch), float(len(self.told))])
        return {"x": x, "y": torch.tensor([float(get_worker_info() is None)])}


class Seen(Regressor):
    """Keeps what it is trained and evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[list[float]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.tolist())
        return super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_workers_are_told_the_epoch_whether_they_stay_or_not(
    make_fit: MakeFit, tmp_path: Path, persistent: bool, resume: bool
) -> None:
    def train(workers: int, from_update: int | None = None) -> tuple[list[Any], list[int]]:
        module, data = Seen(), ByEpoch()
        options: dict[str, Any] = {"dataloader_persistent_workers": True} if persistent and workers else {}
        if not resume:
            options |= {"eval_strategy": "epoch"}  # on the same data, which isn't told of an epoch of training by it
        fit = make_fit(
            module, data, None if resume else data, num_train_epochs=3, per_device_train_batch_size=4, shuffle=True,
            dataloader_num_workers=workers, save_strategy="steps", save_steps=1, **options,
        )  # fmt: skip
        fit.train(resume_from_checkpoint=from_update and tmp_path / "output" / f"checkpoint-{from_update}")
        return module.batches, data.told

    alone, told = train(workers=0)
    assert told == [0, 1, 2]
    assert [batch[0][1:] for batch in alone[:3]] == [[0, 1]] * 3  # in epoch 0, told once
    with_workers, told = train(workers=2)
    assert with_workers == alone and told == [0, 1, 2]
    if resume:
        batches, told = train(2, from_update=4)  # one update of epoch 1 is done
        assert [[row[:2] for row in batch] for batch in batches] == [[row[:2] for row in batch] for batch in alone[4:]]
        assert told == [1, 2]


def test_starts_that_take_long_are_said_once() -> None:
    now = 0.0

    class Slow:
        def __iter__(self) -> Iterator[int]:
            nonlocal now
            now += 4.0
            return iter([1, 2])

    def epoch(starts: WorkerStarts) -> list[int]:
        nonlocal now
        batches = []
        for batch in starts.epoch(Slow()):
            batches.append(batch)
            now += 2.0
        return batches

    starts = WorkerStarts(2, lambda: now)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [epoch(starts) for _ in range(7)] == [[1, 2]] * 7  # 28 seconds of 56
    with pytest.warns(UserWarning, match=r"Starting 2 worker .* took 32 of the last 60 .*persistent_workers=True"):
        epoch(starts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [epoch(starts) for _ in range(20)] == [[1, 2]] * 20


def test_workers_of_an_iterable_do_not_stay() -> None:
    with pytest.warns(UserWarning, match="persistent workers have no effect on an iterable"):
        stream_of(NumberStream(5), dataloader_num_workers=1, dataloader_persistent_workers=True)


# Positions.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "iterable", "ready"])
def test_a_stream_goes_on_where_another_stood(kind: str, workers: int) -> None:
    def make() -> DataStream:
        if kind == "ready":
            sampler = WeightedRandomSampler([1.0] * 22, 22, generator=torch.Generator().manual_seed(4))
            return stream_of(DataLoader(Numbers(22), batch_size=4, sampler=sampler, num_workers=workers))
        data: Dataset = Numbers(22) if kind == "map" else NumberStream(22)
        return stream_of(data, per_device_train_batch_size=4, dataloader_num_workers=workers)

    whole = [batch.tolist() for batch in make().epoch(1)]
    first, second = make(), make()
    batches = first.epoch(1)
    begun = [next(batches).tolist() for _ in range(2)]
    second.load_state_dict(first.state_dict())
    assert begun + [batch.tolist() for batch in second.epoch(1)] == whole


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_a_position_is_good_for_another_number_of_ranks_and_another_batch_size(kind: str) -> None:
    data: Dataset = Numbers(37) if kind == "map" else NumberStream(37)
    one = stream_of(data, per_device_train_batch_size=8)
    whole = [sorted(batch.tolist()) for batch in one.epoch(0)]
    half = stream_of(data, per_device_train_batch_size=8)
    batches = half.epoch(0)
    for _ in range(3):
        next(batches)

    def make(rank: int) -> DataStream:
        stream = stream_of(data, rank, 2, per_device_train_batch_size=2)
        stream.load_state_dict(half.state_dict())
        return stream

    assert updates_over_ranks(make, 2, 2) == whole[3:]


def test_an_iterable_with_workers_goes_on_exactly_after_a_workers_short_batch() -> None:
    # Worker 0 has 0 2 4 6 8, worker 1 has 1 3 5 7: their batches of 2 come in turn, and short ones in the middle.
    def make() -> DataStream:
        return stream_of(NumberStream(9), per_device_train_batch_size=2, dataloader_num_workers=2)

    whole = [batch.tolist() for batch in make().epoch(0)]
    assert whole == [[0, 2], [1, 3], [4, 6], [5, 7], [8]]
    uneven = stream_of(Lopsided(), per_device_train_batch_size=2, dataloader_num_workers=2)
    whole = [batch.tolist() for batch in uneven.epoch(0)]
    assert whole == [[0, 1], [10], [2, 3], [4, 5]]
    for done in range(len(whole)):
        stream = stream_of(Lopsided(), per_device_train_batch_size=2, dataloader_num_workers=2)
        stream.load_state_dict({"position": sum(len(batch) for batch in whole[:done])})
        assert [batch.tolist() for batch in stream.epoch(0)] == whole[done:]


def test_an_iterable_with_workers_says_what_another_batch_size_leaves_out() -> None:
    stream = stream_of(NumberStream(8), per_device_train_batch_size=4, dataloader_num_workers=1)
    stream.load_state_dict({"position": 2})
    with pytest.warns(UserWarning, match="after 2 samples.*2 samples are left out"):
        assert [batch.tolist() for batch in stream.epoch(0)] == [[4, 5, 6, 7]]
    assert stream.position == 8


class Lopsided(IterableDataset):
    """Six samples in the first worker, one in the second."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(6) if info is None or info.id == 0 else [10])


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}])
def test_an_epoch_that_was_left_early_does_not_show_in_the_next(options: dict[str, Any]) -> None:
    stream = stream_of(Numbers(30), per_device_train_batch_size=4, **options)
    whole = [[batch.tolist() for batch in stream.epoch(e)] for e in (0, 1)]
    again = stream_of(Numbers(30), per_device_train_batch_size=4, **options)
    batches = again.epoch(0)
    assert [next(batches).tolist() for _ in range(2)] == whole[0][:2]
    assert [batch.tolist() for batch in again.epoch(1)] == whole[1]
    assert again.position == 30


def test_fraction_counts_what_was_handed_out() -> None:
    stream = stream_of(Numbers(10), per_device_train_batch_size=4)
    fractions = [stream.fraction() for _ in stream.epoch(0)]
    assert fractions == [0.4, 0.8, 1.0]
    ready = stream_of(DataLoader(Numbers(6), batch_sampler=[[5, 4, 3], [0], [1, 2], [0]]))
    assert [ready.fraction() for _ in ready.epoch(0)] == [0.25, 0.5, 0.75, 1.0]
    assert stream_of(NumberStream(4)).fraction() == 0.0


# Randomness inside the dataset.


def test_with_workers_a_batchs_randomness_is_its_place_in_the_run() -> None:
    def batches(workers: int, skip: int = 0, epoch: int = 1) -> list[Tensor]:
        stream = stream_of(NoisyRows(12), per_device_train_batch_size=4, dataloader_num_workers=workers)
        stream.load_state_dict({"position": 4 * skip})
        return [batch["x"] for batch in stream.epoch(epoch)]

    torch.manual_seed(1)
    two = batches(2)
    torch.manual_seed(2)
    torch.testing.assert_close(batches(1), two, rtol=0, atol=0)
    torch.testing.assert_close(batches(2, skip=1), two[1:], rtol=0, atol=0)
    assert not torch.equal(batches(2, epoch=2)[0], two[0])


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_a_worker_is_seeded_to_the_numbers_of_any_process(seed: int) -> None:
    def drawn() -> list[Any]:
        numbers = [
            random.random(),
            random.gauss(0, 1),
            *numpy.random.rand(2),
            numpy.random.randn(),
            *torch.rand(2).tolist(),
        ]
        return [*numbers, torch.randn(3, dtype=torch.float64).tolist(), torch.initial_seed()]

    random_state.seed_everything(seed)
    expected = drawn()
    random_state.seed_everything(seed + 1)
    random_state.seed_worker(seed)
    assert drawn() == expected


def test_batch_seeds_differ() -> None:
    seeds = {batch_seed(s, e, p) for s in range(4) for e in range(4) for p in range(16)}
    assert len(seeds) == 4 * 4 * 16
    assert batch_seed(42, 1, 8) == int(numpy.random.SeedSequence((42, 1, 8)).generate_state(1)[0])


def test_a_dataset_may_fetch_a_whole_batch() -> None:
    class Batched(Numbers):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [100 + index for index in indices]

    for workers in (0, 1):
        stream = stream_of(Batched(4), per_device_train_batch_size=2, shuffle=False, dataloader_num_workers=workers)
        assert [batch.tolist() for batch in stream.epoch(0)] == [[100, 101], [102, 103]]


def test_an_iterable_that_draws_random_numbers_goes_on_in_its_order() -> None:
    rows = list(range(12))
    torch.manual_seed(3)
    stream = stream_of(RowStream(rows, shuffle=True), per_device_train_batch_size=4)
    batches = stream.epoch(0)
    begun = [next(batches).tolist()]
    state = stream.state_dict()
    rest = [batch.tolist() for batch in batches]
    torch.manual_seed(99)
    other = stream_of(RowStream(rows, shuffle=True), per_device_train_batch_size=4)
    other.load_state_dict(state)
    assert [batch.tolist() for batch in other.epoch(0)] == rest
    assert sorted(flat(begun + rest)) == rows


class Drawn(IterableDataset):
    """Samples in an order drawn from the three global generators while it is read."""

    def __iter__(self) -> Iterator[int]:
        numbers = torch.randperm(21).tolist()
        while numbers:
            draw = random.random() + numpy.random.random() + torch.rand(()).item()
            yield numbers.pop(int(draw * len(numbers)) % len(numbers))


def drawing(kind: str) -> Any:
    """Data whose order is drawn at random: an iterable, and a ready loader with a sampler of that kind."""
    if kind == "iterable":
        return Drawn()
    return DataLoader(Numbers(21), batch_size=2, sampler=WeightedRandomSampler([1.0] * 21, 21, replacement=False))


@pytest.mark.parametrize("kind", ["iterable", "loader"])
def test_ranks_with_random_states_of_their_own_share_one_drawn_order(kind: str) -> None:
    def epoch(rank: int, size: int, epoch: int = 1, seed: int = 0) -> list[list[int]]:
        random.seed(seed + rank)
        numpy.random.seed(seed + rank)
        torch.manual_seed(seed + rank)
        stream = stream_of(drawing(kind), rank, size, per_device_train_batch_size=2)
        found = []
        for batch in stream.epoch(epoch):
            torch.rand(rank + 1)  # dropout, say
            found.append(samples_of(batch))
        return found

    shared = flat(flat(pair) for pair in zip(epoch(0, 2), epoch(1, 2), strict=True))
    assert sorted(shared) == list(range(21))
    assert shared == flat(epoch(0, 1)) == flat(epoch(0, 1, seed=7))
    assert shared != flat(epoch(0, 1, epoch=2))


@pytest.mark.parametrize("kind", ["iterable", "loader"])
def test_a_drawn_order_leaves_the_global_random_state_alone(kind: str) -> None:
    def draw() -> list[float]:
        return [random.random(), float(numpy.random.random()), torch.rand(()).item()]

    def seed() -> None:
        random.seed(5)
        numpy.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = draw() + draw()
    seed()
    batches = stream_of(drawing(kind), per_device_train_batch_size=2).epoch(0)
    next(batches)
    found = draw()
    assert len(list(batches)) == 10
    assert found + draw() == expected


# What can't be used.


@pytest.mark.parametrize("training", [True, False])
def test_empty_data_is_refused(training: bool) -> None:
    kind = "train_data" if training else "eval_data"
    for data in ([], Numbers(0), DataLoader(Numbers(0), batch_size=2)):
        with pytest.raises(ValueError, match=rf"{kind} is empty: len\(\w+\) is 0\."):
            stream_of(data, training=training)


def test_data_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"train_data takes a Dataset .* Received: generator"):
        stream_of(n for n in range(3))
    with pytest.raises(TypeError, match=r"eval_data takes a Dataset .* Received: int"):
        stream_of(3, training=False)


def test_dropping_the_only_batch_is_refused() -> None:
    arguments = {"per_device_train_batch_size": 4, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match="7 samples, fewer than one global micro-batch of 8"):
        stream_of(Numbers(7), 0, 2, **arguments)
    assert len(stream_of(Numbers(8), 0, 2, **arguments)) == 1


# Workers of an iterable dataset.


class Plain(IterableDataset):
    """Samples 0 to count - 1 in every worker: it knows nothing of workers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


class Shuffled(Plain):
    """Plain, in an order that the global generators draw."""

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count).tolist()
        while order:
            yield order.pop(random.randrange(len(order)))


def noisy(samples: list[int]) -> list[tuple[int, float]]:
    """A collation that draws as many random numbers as there are samples."""
    return [(sample, torch.rand(()).item()) for sample in samples]


def simulated(dataset: IterableDataset, workers: int, rank: int, size: int, batch: int, skip: int) -> list[Any]:
    """A rank's batches as torch's loader takes them from workers in turn, without its processes."""
    options = LoaderOptions(batch, False, False, list, {})
    parts = []
    for worker in range(workers):
        shares = Shares(dataset, options, 3, 1, rank, size, skip)
        own = OwnRandomState(batch_seed(3, 1, 0))
        with own.entered():
            samples = iter(dataset)
            for _ in itertools.islice(samples, skip):
                pass
        parts.append(shares.cut(samples, own, skip, worker, workers))
    found: list[Any] = []
    active = list(parts)
    while active:
        for part in list(active):
            share = next(part, None)
            if share is None:
                active.remove(part)
            else:
                found.append(share.batch if share.is_mine else [])
    return found


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 40), batch=st.integers(1, 5), workers=st.integers(1, 3), size=st.integers(1, 3),
    done=st.integers(0, 6), shuffled=st.booleans(),
)  # fmt: skip
def test_workers_and_ranks_share_every_sample_once_and_in_one_order(
    count: int, batch: int, workers: int, size: int, done: int, shuffled: bool
) -> None:
    data = Shuffled(count) if shuffled else Plain(count)
    whole = [number for part in simulated(data, 1, 0, 1, 1, 0) for number in part]
    assert sorted(whole) == list(range(count))
    skip = min(count, done * batch * size)
    by_rank = [simulated(data, workers, rank, size, batch, skip) for rank in range(size)]
    assert [number for parts in zip(*by_rank, strict=True) for part in parts for number in part] == whole[skip:]


@pytest.mark.parametrize("kind", [Plain, Shuffled])
def test_workers_give_an_iterable_once_and_in_the_order_of_none(kind: type[Plain]) -> None:
    def epoch(workers: int, skip: int = 0, rank: int = 0, size: int = 1) -> list[Any]:
        data = DataLoader(kind(23), batch_size=4 // size, num_workers=workers, collate_fn=noisy)
        stream = stream_of(data, rank, size)
        stream.load_state_dict({"position": skip})
        found = list(stream.epoch(1))
        assert stream.position == 23
        return found

    whole = epoch(0)
    assert sorted(sample for batch in whole for sample, _ in batch) == list(range(23))
    assert epoch(1) == epoch(3) == whole
    assert epoch(2, skip=8) == whole[2:]
    pair = [epoch(2, rank=rank, size=2) for rank in (0, 1)]
    joined = [[sample for part in parts for sample, _ in part] for parts in zip(*pair, strict=True)]
    assert joined == [[sample for sample, _ in batch] for batch in whole]


class Declared(Plain):
    """Seeds by the worker's id, and shares nothing."""

    shares_among_workers = False

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        random.seed(info.id if info else 0)
        return super().__iter__()


class Late(Plain):
    """Asks for its share when it has handed out a sample."""

    def __iter__(self) -> Iterator[int]:
        yield 0
        info = get_worker_info()
        yield from range(1 + info.id, self.count, info.num_workers)


def test_a_dataset_says_whether_it_shares_its_samples_where_that_cant_be_told() -> None:
    def batches(data: IterableDataset) -> list[list[int]]:
        stream = stream_of(data, per_device_train_batch_size=2, dataloader_num_workers=2)
        return [batch.tolist() for batch in stream.epoch(0)]

    assert batches(Declared(5)) == [[0, 1], [2, 3], [4]]
    with pytest.warns(UserWarning, match=r"Lopsided asks get_worker_info.*Set shares_among_workers = True"):
        batches(Lopsided())
    with pytest.raises(RuntimeError, match=r"Late asked get_worker_info.*only after its first sample"):
        batches(Late(9))


def cut_by_worker(worker_id: int) -> None:
    """torch's own example of sharing: worker_init_fn changes the worker's dataset."""
    info = get_worker_info()
    info.dataset.count = 10 if info.id < info.num_workers - 1 else 1


def test_a_share_made_by_worker_init_fn_is_not_shared_again() -> None:
    loader = DataLoader(Plain(99), batch_size=4, num_workers=2, worker_init_fn=cut_by_worker)
    found = [batch.tolist() for batch in stream_of(loader).epoch(0)]
    assert found == [[0, 1, 2, 3], [0], [4, 5, 6, 7], [8, 9]]


def test_a_dataset_that_shares_its_samples_needs_as_many_workers_at_a_resume() -> None:
    def stream(workers: int) -> DataStream:
        return stream_of(NumberStream(12), per_device_train_batch_size=2, dataloader_num_workers=workers)

    first = stream(2)
    batches = first.epoch(0)
    next(batches)
    state = first.state_dict()
    other = stream(3)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"3 workers by itself, .* had 2.*Set dataloader_num_workers=2"):
        other.epoch(0)


# Tuples stay tuples.


class Pairs(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index)), index


def test_samples_that_are_tuples_make_a_tuple_and_an_own_list_stays_one() -> None:
    ready = DataLoader(Pairs(), batch_sampler=[[0, 1], [2, 3]])
    whole = DataLoader([(torch.ones(2), torch.zeros(2))], batch_size=None)
    for data in (Pairs(), DataLoader(Pairs(), batch_size=2), ready, whole):
        [batch, *_] = stream_of(data, per_device_train_batch_size=2).epoch(0)
        assert type(batch) is tuple and len(batch) == 2
    lists = stream_of(DataLoader(Pairs(), batch_size=2, collate_fn=list))
    assert [type(batch) for batch in lists.epoch(0)] == [list, list]
    texts = stream_of(["a", "b", "c"], per_device_train_batch_size=3, shuffle=False)
    assert list(texts.epoch(0)) == [["a", "b", "c"]]
