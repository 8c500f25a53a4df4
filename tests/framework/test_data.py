"""Batches: one order that the seed decides, shared among ranks without loss or repetition, resumable at any sample."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import pytest
import torch
from stratagem import FitArguments
from stratagem.framework.data import DataStream, make_stream
from stratagem.framework.data.mapped import MapStream
from stratagem.framework.data.reread import IterableStream, LoaderStream
from stratagem.framework.data.stream import batch_seed
from stratagem.framework.objective import Weightless
from stratagem.strategies import Strategy
from tiny import NoisyRows, Numbers, NumberStream, RowStream
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
    return [] if isinstance(batch, Weightless) else batch.tolist()


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
            if isinstance(b, Weightless):
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
    assert [type(batch) for batch in second] == [Tensor, Weightless]
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
