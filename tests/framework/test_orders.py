"""The computed order of an epoch: a permutation of any number of samples, whose statistics are those of chance.

Seeds are fixed, so each number below is the same on every run. ``excess`` is a chi-square in its standard deviations;
that of a network of three rounds is above 100.
"""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from forging import seal
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem import FitArguments
from stratagem.framework.data.making import make_stream
from stratagem.framework.data.mapped import MapStream
from stratagem.framework.data.orders import AT_ONCE, COMPUTED_FROM, ComputedOrder, drawn_order, look_up
from stratagem.strategies import Strategy
from tiny import MakeFit, Regressor
from torch import Tensor
from torch.utils.data import Dataset

MANY = 10**9 + 7


def first(samples: int, count: int, seed: int = 42, epoch: int = 0) -> Any:
    return ComputedOrder(samples, seed, epoch)(numpy.arange(count))


def excess(values: Any, bins: int) -> float:
    """How far from uniform values in 0..1 are, in standard deviations of a chi-square."""
    counts = numpy.bincount((numpy.asarray(values) * bins).astype(int), minlength=bins)
    expected = counts.sum() / bins
    return float((((counts - expected) ** 2 / expected).sum() - (bins - 1)) / math.sqrt(2 * (bins - 1)))


def excess_of_pairs(one: Any, other: Any, bins: int = 64) -> float:
    return excess((numpy.floor(one * bins) + other) / bins, bins * bins)


# A permutation.


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.integers(1, 5000), st.builds(lambda k, d: max(1, 2**k + d), st.integers(0, 15), st.integers(-1, 1))),
    st.integers(0, 2**64),
    st.integers(0, 2**32),
)
def test_every_sample_comes_once(samples: int, seed: int, epoch: int) -> None:
    order = ComputedOrder(samples, seed, epoch)
    assert numpy.array_equal(numpy.sort(order(numpy.arange(samples))), numpy.arange(samples))


@pytest.mark.parametrize("samples", [COMPUTED_FROM - 1, COMPUTED_FROM, COMPUTED_FROM + 1, 1_299_709])
def test_every_one_of_a_million_samples_comes_once(samples: int) -> None:
    assert (numpy.bincount(first(samples, samples), minlength=samples) == 1).all()


def by_hand(samples: int, seed: int, epoch: int, position: int) -> int:
    """The index at a position, in whole numbers of Python."""
    least = math.isqrt(samples - 1) + 1
    width = min(range(least, least + min(64, least // 16 + 1)), key=lambda width: -samples % width)
    keys = numpy.random.SeedSequence((seed, epoch), spawn_key=(0,)).generate_state(8, numpy.uint64)
    while True:
        high, low = divmod(position, width)
        own, other = -(-samples // width), width
        for key in keys.tolist():
            mixed = (low ^ key) * 0x9E3779B97F4A7C15 % 2**64
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 % 2**64 >> 32
            high, low = low, (high + (mixed * own >> 32)) % own
            own, other = other, own
        position = high * width + low
        if position < samples:
            return position


def test_the_order_is_the_same_on_every_machine() -> None:
    """Runs that are resumed depend on these values: they must not change."""
    assert first(MANY, 4).tolist() == [81731293, 686805788, 584706599, 944666962]
    assert first(2**20, 4, seed=7, epoch=3).tolist() == [473255, 738904, 103981, 625399]
    assert first(2**61 + 1, 2, seed=2**63, epoch=9).tolist() == [552292595061219427, 1790959594432555937]
    for samples in (1, 2, 1000, 2**20 + 1, MANY, 2**61 + 1):
        assert first(samples, min(samples, 20), 3, 4).tolist() == [
            by_hand(samples, 3, 4, position) for position in range(min(samples, 20))
        ]


def test_positions_may_be_asked_for_in_any_order() -> None:
    order, positions = ComputedOrder(MANY, 1, 2), numpy.array([MANY - 1, 5, 77_000, 5])
    alone = [int(order(positions[i : i + 1])[0]) for i in range(4)]
    assert order(positions).tolist() == alone and alone[1] == alone[3]


# Chance.


@pytest.mark.parametrize("samples", [2**20, 2**20 + 1, MANY])
def test_neighbours_are_far_apart_as_by_chance(samples: int) -> None:
    order = ComputedOrder(samples, 42, 0)
    part = order(numpy.arange(2**18)) / samples
    assert excess(part, 256) < 4
    assert excess(1 - (1 - numpy.abs(numpy.diff(part))) ** 2, 256) < 4  # the distance of two numbers in 0..1
    width, height = order.width, order.height
    for lag in (1, 2, 3, 32, width - 1, width, width + 1, height, 2 * width):
        one, other = part[:-lag], part[lag:]
        assert abs(numpy.corrcoef(one, other)[0, 1]) * math.sqrt(len(one)) < 4, lag
        assert excess_of_pairs(one, other) < 4, lag
    digits = order(numpy.arange(2**18)) % width / width  # the lower ones of the numbers that the network permutes
    for lag in (1, width, height) if samples == MANY else ():  # fewer numbers would be unevenly in bins
        assert excess_of_pairs(digits[:-lag], digits[lag:], 32) < 4, lag
    runs = numpy.flatnonzero(numpy.diff(part) < 0)  # ends of rising runs, of which there are (n + 1) / 2 by chance
    assert abs(len(runs) - 2**17) < 4 * math.sqrt(2**18 / 12)


def test_first_positions_are_uniform_over_seeds_and_epochs() -> None:
    found = numpy.array(
        [ComputedOrder(MANY, seed, epoch)(numpy.array([0, 1, 2, 12345, MANY - 1]))
         for seed in range(64) for epoch in range(32)]
    )  # fmt: skip
    for column in found.T / MANY:
        assert abs(excess(column, 64)) < 4
    assert abs(excess_of_pairs(found[:, 0] / MANY, found[:, 1] / MANY, 16)) < 4
    assert len(numpy.unique(found)) > found.size - 5


@pytest.mark.parametrize("pair", [((42, 0), (42, 1)), ((42, 0), (43, 0)), ((42, 1), (43, 0)), ((0, 0), (0, 2**20))])
def test_epochs_and_seeds_have_orders_of_their_own(pair: tuple[tuple[int, int], tuple[int, int]]) -> None:
    one, other = (first(2**20, 2**20, *of) for of in pair)
    assert abs(excess_of_pairs(one / 2**20, other / 2**20)) < 4
    assert (one == other).sum() < 8  # one by chance


def test_as_many_samples_stay_in_their_place_as_by_chance() -> None:
    fixed = [int((first(4099, 4099, seed) == numpy.arange(4099)).sum()) for seed in range(1000)]
    assert abs(numpy.mean(fixed) - 1) < 4 / math.sqrt(1000) and abs(numpy.var(fixed) - 1) < 0.3


# The streams that read it.


class Rows(Dataset):
    """So many rows, made when they are asked for; ``reads`` are the indices that were."""

    def __init__(self, count: int) -> None:
        self.count, self.reads = count, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.reads.append(index)
        return {"x": torch.full((3,), index / self.count), "y": torch.ones(1)}


def stream_of(data: Any, rank: int = 0, size: int = 1, **arguments: Any) -> MapStream:
    strategy = Strategy()
    strategy.data_rank, strategy.data_size = rank, size
    stream = make_stream(data, FitArguments(**arguments), strategy, training=True)
    assert isinstance(stream, MapStream)
    return stream


def old(stream: MapStream, position: int = 0) -> MapStream:
    """A stream that goes on from a checkpoint of an earlier version."""
    stream.load_state_dict({"position": position, "global_micro_batch": 8})
    return stream


def taken(stream: MapStream, count: int, epoch: int = 0) -> list[list[int]]:
    """The indices of the first batches from where the stream stands."""
    stream.position, stream.epoch_number = stream.begin(), epoch
    requests = stream.requests()
    return [next(requests) for _ in range(count)]


@pytest.mark.parametrize("position", [0, 900, MANY - 44])
@pytest.mark.parametrize(("size", "each"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_ranks_share_the_computed_order(size: int, each: int, position: int) -> None:
    expected = ComputedOrder(MANY, 42, 5)(numpy.arange(position, min(position + 48, MANY))).tolist()
    count = -(-len(expected) // 8)
    ranks = []
    for rank in range(size):
        stream = stream_of(Rows(MANY), rank, size, per_device_train_batch_size=each)
        stream.load_state_dict({**stream.state_dict(), "position": position})
        ranks.append(taken(stream, count, epoch=5))
        assert stream.indices(5, position, position + len(expected)) == expected
    seen = [index for batches in zip(*ranks, strict=True) for batch in batches for index in batch]
    # The last of a billion and seven samples are a micro-batch of four, of which a rank of eight may have none.
    assert seen[: len(expected)] == expected


def test_a_billion_samples_take_no_memory_and_a_resume_jumps() -> None:
    tracemalloc.start()
    try:
        stream = stream_of(Rows(MANY), per_device_train_batch_size=AT_ONCE // 4)
        stream.load_state_dict({**stream.state_dict(), "position": MANY // 2})
        (batch,) = taken(stream, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch == ComputedOrder(MANY, 42, 0)(numpy.arange(MANY // 2, MANY // 2 + AT_ONCE // 4)).tolist()
    assert peak < 2**20


def test_the_order_is_drawn_below_the_limit_and_computed_from_there_on() -> None:
    below, at = stream_of(Rows(COMPUTED_FROM - 1), seed=3), stream_of(Rows(COMPUTED_FROM), seed=3)
    drawn = torch.randperm(COMPUTED_FROM - 1, generator=torch.Generator().manual_seed(5))[:8]
    assert taken(below, 1, epoch=2) == [drawn.tolist()] and below.state_dict()["order"] == "drawn"
    assert taken(at, 1, epoch=2) == [first(COMPUTED_FROM, 8, 3, 2).tolist()] and at.state_dict()["order"] == "computed"


@pytest.mark.parametrize("samples", [1, 1000, 2**20 + 3])
def test_a_drawn_order_takes_half_the_memory_and_has_the_old_values(samples: int) -> None:
    values = torch.randperm(samples, generator=torch.Generator().manual_seed(9)).numpy()
    found = drawn_order(samples, 9)(numpy.arange(samples))
    assert found.dtype == numpy.int32 and numpy.array_equal(found, values)


def test_who_goes_on_from_an_old_checkpoint_goes_on_in_the_old_order() -> None:
    samples = COMPUTED_FROM + 1
    drawn = [torch.randperm(samples, generator=torch.Generator().manual_seed(42 + epoch)) for epoch in (0, 1)]
    stream = old(stream_of(Rows(samples)), position=16)
    assert taken(stream, 1) == [drawn[0][16:24].tolist()]
    assert taken(stream, 1, epoch=1) == [drawn[1][:8].tolist()]
    later = stream_of(Rows(samples))
    later.load_state_dict(stream.state_dict())
    assert taken(later, 1, epoch=1) == [drawn[1][:8].tolist()] and later.state_dict()["order"] == "drawn"
    later.begin_anew()
    assert taken(later, 1) == [first(samples, 8).tolist()]


def test_look_up_keeps_ranges_apart() -> None:
    ranges = [range(3), range(3, 4), range(10, 13), range(5, 5), range(AT_ONCE, AT_ONCE + 3)] * 900
    found = [part.tolist() for part in look_up(lambda positions: positions * 2, iter(ranges), 3)]
    assert found == [[2 * position for position in each] for each in ranges]


class Lengths(Rows):
    """Rows whose lengths are known."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.length = (numpy.arange(count, dtype=numpy.int64) * 7919 % 997 + 1).tolist()
        self.length[77] = 5000


def test_groups_of_like_lengths_follow_the_computed_order() -> None:
    samples, data = COMPUTED_FROM + 9, Lengths(COMPUTED_FROM + 9)
    options: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    stream = stream_of(data, per_device_train_batch_size=8, **options)
    order, size = stream.order(1), 50 * 8
    whole = numpy.concatenate([order(part) for part in numpy.array_split(numpy.arange(samples), samples // AT_ONCE)])
    assert (numpy.bincount(whole, minlength=samples) == 1).all() and whole[0] == 77
    single, lengths = first(samples, samples, epoch=1), numpy.array(data.length)
    for begin in (0, size, 700 * size, samples // size * size):
        group = single[begin : begin + size]
        group = group[numpy.argsort(-lengths[group], kind="stable")]
        assert (whole[begin : begin + size] != group).sum() <= 1  # but for the longest of all, and what it replaced
    halves = [stream_of(data, rank, 2, per_device_train_batch_size=4, **options) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict({**stream.state_dict(), "position": size - 8})
    parts = [taken(half, 3, epoch=1) for half in halves]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole[size - 8 : size + 16].reshape(3, 8).tolist()


def without_ends(data: Rows) -> list[int]:
    """What was read but for the first sample and the last, by which a checkpoint tells the data from another."""
    return [index for index in data.reads if index not in (0, len(data) - 1)]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_run_goes_on_in_the_order_that_its_checkpoint_says(make_fit: MakeFit, tmp_path: Path, is_old: bool) -> None:
    samples = COMPUTED_FROM + 5
    options: dict[str, Any] = {"shuffle": True, "limit_train_batches": 3, "max_steps": 8, "save_steps": 4}
    options["save_strategy"] = "steps"
    whole = Rows(samples)
    make_fit(Regressor(), whole, **options).train()
    path = tmp_path / "output" / "checkpoint-4"  # the first update of the second epoch
    orders = [drawn_order(samples, 42 + epoch) if is_old else ComputedOrder(samples, 42, epoch) for epoch in range(3)]
    expected = [index for order in orders for index in order(numpy.arange(24)).tolist()][: 8 * 8]
    if is_old:
        state = json.loads((path / "state.json").read_text())
        assert state["data"].pop("order") == "computed"
        (path / "state.json").write_text(json.dumps(state))
        seal(path)
    else:
        assert without_ends(whole) == expected
    data = Rows(samples)
    fit = make_fit(Regressor(), data, **options)
    fit.train(resume_from_checkpoint=path)
    assert without_ends(data) == expected[-32:]
    saved = json.loads((tmp_path / "output" / "checkpoint-8" / "state.json").read_text())
    assert saved["data"]["order"] == ("drawn" if is_old else "computed")
