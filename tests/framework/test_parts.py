"""Iterable data of which each rank, and each worker, reads a part: once each, in step, and exactly again."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem import FitArguments
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.data import DataStream, limit_evaluation, make_stream
from stratagem.framework.data.parts import AHEAD, PartsStream, own_state_problem
from stratagem.framework.data.stand_in import StandIn
from stratagem.strategies import Strategy
from tiny import MakeFit, Regressor, StopAt, logs_of, parameters_of, regression_rows
from torch.utils.data import IterableDataset, get_worker_info

READ: list[int] = []  # what was read in this process


class Pieces(IterableDataset):
    """Numbers in pieces, which may remember their place, and draw noise and an order."""

    shares_among_ranks = True

    def __init__(self, pieces: list[list[int]], shuffles: bool = False) -> None:
        self.pieces, self.shuffles, self.fails_at = pieces, shuffles, -1

    def shard(self, num_shards: int, index: int) -> "Pieces":
        part = copy.copy(self)
        part.pieces = self.pieces[index::num_shards]
        return part

    def __iter__(self) -> Iterator[Any]:
        assert get_worker_info() is None  # alone with its part
        numbers = [number for piece in self.pieces for number in piece]
        if self.shuffles:
            numbers = [numbers[place] for place in torch.randperm(len(numbers))]
        yield from self.tell(numbers, 0)

    def tell(self, numbers: list[int], place: int) -> Iterator[Any]:
        for number in numbers[place:]:
            if number == self.fails_at:
                raise OSError(f"sample {number} is gone")
            self.note(number)
            yield {"number": torch.tensor(number), "noise": torch.rand(())}

    def note(self, number: int) -> None:
        READ.append(number)


class Remembering(Pieces):
    """The same, which brings itself back to its place."""

    place = 0

    def __iter__(self) -> Iterator[Any]:
        return self.tell([number for piece in self.pieces for number in piece], self.place)

    def note(self, number: int) -> None:
        super().note(number)
        self.place += 1

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Room:
    """Where the ranks of a test exchange numbers; one of them runs at a time, as they share random generators."""

    def __init__(self, size: int) -> None:
        self.turn, self.all_there = threading.Lock(), threading.Barrier(size)
        self.told: dict[int, list[list[int]]] = {}

    def add_up(self, number: int, values: list[int]) -> list[int]:
        self.told.setdefault(number, []).append(values)
        self.turn.release()
        self.all_there.wait(20)
        self.turn.acquire()
        return [sum(column) for column in zip(*self.told[number], strict=True)]


class RankOf(Strategy):
    """A rank among threads."""

    def __init__(self, room: Room, rank: int, size: int) -> None:
        super().__init__()
        self.room, self.calls = room, 0
        self.data_rank, self.data_size, self.world_size = rank, size, size

    def sum_on_host(self, values: list[int]) -> list[int]:
        self.calls += 1
        return self.room.add_up(self.calls, values)


def on_ranks(size: int, job: Callable[[RankOf], Any]) -> list[Any]:
    """What a job returns, or raises, for each rank."""
    room, results = Room(size), [None] * size

    def run(rank: int) -> None:
        with room.turn:
            try:
                results[rank] = job(RankOf(room, rank, size))
            except Exception as error:
                results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def stream_of(data: Any, strategy: Strategy, training: bool = True, **arguments: Any) -> DataStream:
    return make_stream(data, FitArguments(**arguments), strategy, training=training)


def alone() -> Strategy:
    strategy = Strategy()
    strategy.data_rank, strategy.data_size = 0, 1
    return strategy


def told(batches: Iterator[Any]) -> list[Any]:
    """Each batch as the numbers and the noise in it; None for a stand-in."""
    return [None if isinstance(b, StandIn) else (b["number"].tolist(), b["noise"].tolist()) for b in batches]


def numbers_of(batches: list[Any]) -> list[int]:
    return [number for batch in batches if batch is not None for number in batch[0]]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4), batch=st.integers(1, 4), drops=st.booleans(),
    kind=st.sampled_from([Pieces, Remembering]), stop=st.integers(1, 60), limit=st.integers(1, 40) | st.none(),
)  # fmt: skip
def test_ranks_read_their_parts_once_and_a_resume_goes_on_exactly(
    sizes: list[int], batch: int, drops: bool, kind: type[Pieces], stop: int, limit: int | None
) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    data = kind([list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)])
    data.shuffles = kind is Pieces
    arguments: dict[str, Any] = {"per_device_train_batch_size": batch, "dataloader_drop_last": drops}
    if limit is not None:
        arguments["limit_train_batches"] = limit
    size = len(sizes)
    kept = [count // batch * batch if drops else count for count in sizes]
    micro_batches = -(-max(kept) // batch)
    if limit is not None:
        micro_batches, kept = min(micro_batches, limit), [min(count, limit * batch) for count in kept]
    if 0 in kept:
        return

    def whole(strategy: RankOf) -> Any:
        stream = stream_of(data, strategy, **arguments)
        positions = []
        batches = []
        for each in stream.epoch(3):
            batches += told(iter([each]))
            positions.append(stream.position)
        return batches, positions, strategy.calls

    READ.clear()
    results = on_ranks(size, whole)
    everything = [batches for batches, _, _ in results]
    assert {len(batches) for batches in everything} == {micro_batches}
    assert [len(numbers_of(batches)) for batches in everything] == kept
    if limit is None:
        assert sorted(READ) == list(range(ends[-1]))  # each sample once, over all ranks
    # A position is the samples over all ranks.
    counts = [sum(len(batches[i][0]) for batches in everything if batches[i]) for i in range(micro_batches)]
    assert all(positions == [sum(counts[: i + 1]) for i in range(micro_batches)] for _, positions, _ in results)
    assert {calls for _, _, calls in results} <= {micro_batches // AHEAD, micro_batches // AHEAD + 1}

    stop = min(stop, micro_batches)

    def first(strategy: RankOf) -> Any:
        stream = stream_of(data, strategy, **arguments)
        batches = stream.epoch(3)
        for _ in range(stop):
            next(batches)
        return stream.state_dict(), stream.own_state()

    states = on_ranks(size, first)

    def rest(strategy: RankOf) -> Any:
        stream = stream_of(data, strategy, **arguments)
        state, own = states[strategy.data_rank]
        stream.load_state_dict(state)
        stream.load_own_state(own)
        return told(stream.epoch(3))

    READ.clear()
    for again, before in zip(on_ranks(size, rest), everything, strict=True):
        assert again == before[stop:]
    if kind is Remembering and limit is None and not drops:
        # Nothing is read again, but the batch that stands in where a part had ended.
        left = [number for batches in everything for number in numbers_of(batches[stop:])]
        ended = [batches for batches in everything if not numbers_of(batches[stop:])]
        assert sorted(READ) == sorted(left + [number for batches in ended for number in batches[0][0]])


def test_a_failure_on_one_rank_ends_all_at_the_same_micro_batch() -> None:
    data = Pieces([list(range(40)), list(range(40, 80)), list(range(80, 83))])
    data.fails_at = 60  # in micro-batch 10 of rank 1, the third of its second block

    def job(strategy: RankOf) -> Any:
        seen = []
        try:
            for batch in stream_of(data, strategy, per_device_train_batch_size=2).epoch(0):
                seen.append(batch)
        except OSError as error:
            return len(seen), str(error)
        return len(seen), None

    assert on_ranks(3, job) == [(10, None), (10, "sample 60 is gone"), (10, None)]


def test_a_part_without_a_sample_is_refused() -> None:
    data = Pieces([[1, 2], []])
    found = on_ranks(2, lambda strategy: told(stream_of(data, strategy).epoch(0)))
    assert found[0] == [] and "gave rank 1 of 2 a part without a batch" in str(found[1])


@pytest.mark.parametrize("kind", [Pieces, Remembering])
def test_each_worker_has_a_part_and_resumes_in_it(kind: type[Pieces]) -> None:
    data = kind([list(range(11)), list(range(11, 14)), list(range(14, 34))])
    arguments: dict[str, Any] = {"per_device_train_batch_size": 2, "dataloader_num_workers": 3}
    everything = told(stream_of(data, alone(), **arguments).epoch(1))
    assert sorted(numbers_of(everything)) == list(range(34))
    assert [batch[0][0] for batch in everything[:9]] == [0, 11, 14, 2, 13, 16, 4, 18, 6]  # in turn, while they last
    for stop in (1, 5, 7, len(everything) - 1):
        stream = stream_of(data, alone(), **arguments)
        batches = stream.epoch(1)
        for _ in range(stop):
            next(batches)
        again = stream_of(data, alone(), **arguments)
        again.load_state_dict(stream.state_dict())
        again.load_own_state(stream.own_state())
        assert told(again.epoch(1)) == everything[stop:]
        del batches


def test_epochs_differ_where_the_data_is_drawn_and_repeat_where_asked() -> None:
    data = Pieces([list(range(20))], shuffles=True)
    stream = stream_of(data, alone(), per_device_train_batch_size=4)
    first, second = told(stream.epoch(0)), told(stream.epoch(1))
    assert sorted(numbers_of(first)) == sorted(numbers_of(second)) == list(range(20)) and first != second
    assert told(stream_of(data, alone(), per_device_train_batch_size=4).epoch(1)) == second
    state = torch.get_rng_state()
    told(stream.epoch(2))
    assert torch.get_rng_state().equal(state)
    repeated = stream_of(data, alone(), per_device_train_batch_size=4, overfit_batches=3)
    assert told(repeated.epoch(0)) == told(repeated.epoch(1)) and len(told(repeated.epoch(2))) == 3


def test_a_limited_evaluation_ends_after_whole_micro_batches() -> None:
    def job(strategy: RankOf) -> int:
        arguments = FitArguments(per_device_eval_batch_size=2, limit_eval_batches=3)
        stream = make_stream(Pieces([list(range(20)), list(range(20, 40))]), arguments, strategy, training=False)
        limit_evaluation(stream, arguments)
        return len(list(stream.epoch(0)))

    assert on_ranks(2, job) == [2, 2]


# What can't work.


def test_saying_it_without_a_method_and_too_few_shards_are_refused() -> None:
    class Nothing(IterableDataset):
        shares_among_ranks = True

        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(TypeError, match=r"Nothing\.shares_among_ranks is True, and there is no method shard"):
        stream_of(Nothing(), alone())
    few = Pieces([[1], [2]])
    few.num_shards = 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Pieces has 2 shards, and 1 ranks with 3 workers each need 3"):
        stream_of(few, alone(), dataloader_num_workers=3)


def test_a_state_that_json_cannot_hold_is_refused() -> None:
    class Odd(Remembering):
        def state_dict(self) -> dict[str, Any]:
            return {"place": (1, 2)}

    with pytest.raises(TypeError, match=r"The state_dict\(\) of Odd can't be saved: JSON would give back something"):
        list(stream_of(Odd([[1]]), alone()).epoch(0))


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (None, None),
        ({"turn": 0, "micro_batches": 3, "workers": [{"batches": 3, "state": "{}"}]}, None),
        ([], "no list of workers"),
        ({"turn": 0, "micro_batches": 3, "workers": []}, "no list of workers"),
        ({"turn": 1, "micro_batches": 3, "workers": [{"batches": 3, "state": None}]}, "are counts"),
        ({"turn": 0, "micro_batches": -1, "workers": [{"batches": 3, "state": None}]}, "are counts"),
        ({"turn": 0, "micro_batches": 3, "workers": [{"batches": 3.0, "state": None}]}, "are counts"),
        ({"turn": 0, "micro_batches": 3, "workers": [{"batches": 3, "state": {}}]}, "is a text"),
    ],
)
def test_an_altered_state_of_a_rank_is_told(state: Any, why: str | None) -> None:
    found = own_state_problem(state)
    assert found is None if why is None else why in str(found)


def test_without_the_word_every_rank_reads_all() -> None:
    data = Pieces([[1, 2], [3, 4]])
    data.shares_among_ranks = False
    stream = stream_of(data, alone())
    assert not isinstance(stream, PartsStream) and numbers_of(told(stream.epoch(0))) == [1, 2, 3, 4]


# In a run.


class Rows(Remembering):
    """Rows to train on, by their numbers."""

    def tell(self, numbers: list[int], place: int) -> Iterator[Any]:
        rows = regression_rows(64)
        for item in super().tell(numbers, place):
            row = rows[int(item["number"])]
            yield {"x": row["x"] + item["noise"], "y": row["y"]}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_from_a_checkpoint_to_the_bit(make_fit: MakeFit, tmp_path: Path, workers: int) -> None:
    arguments: dict[str, Any] = {
        "max_steps": 14, "per_device_train_batch_size": 4, "dataloader_num_workers": workers, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2,
    }  # fmt: skip

    def made(name: str, **more: Any) -> Any:
        torch.manual_seed(0)
        data = Rows([list(range(30)), list(range(30, 50))])
        directory = str(tmp_path / name)
        return make_fit(Regressor(), data, eval_data=data, output_dir=directory, **{**arguments, **more})

    whole, cut = made("whole"), made("cut", callbacks=[StopAt(10)])
    whole.train()
    cut.train()
    resumed = made("cut")
    resumed.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-9")
    assert logs_of(resumed) == logs_of(whole)
    assert all(value.equal(parameters_of(whole.module)[name]) for name, value in parameters_of(resumed.module).items())
    assert resumed.evaluate() == whole.evaluate()
    for other, what in (
        ({"per_device_train_batch_size": 2}, "another batch size"),
        ({"dataloader_num_workers": 1}, "another number of workers" if workers != 1 else ""),
    ):
        if workers or "per_device_train_batch_size" in other:
            with pytest.raises(CheckpointError, match=f"in the middle of an epoch, and this run's data has {what}"):
                made("cut", **other).train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-9")
    anew = made("cut", ignore_data_skip=True, per_device_train_batch_size=2)
    anew.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-9")


@pytest.mark.slow
@pytest.mark.parametrize("buffer", [0, 6])
def test_a_streamed_dataset_of_datasets(make_fit: MakeFit, tmp_path: Path, buffer: int) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {name: torch.stack([row[name] for row in regression_rows(40)]).numpy() for name in ("x", "y")}

    def made(name: str, **more: Any) -> Any:
        torch.manual_seed(0)
        data = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=4).with_format("torch")
        data = data.shuffle(seed=3, buffer_size=buffer) if buffer else data
        data.shares_among_ranks = True
        return make_fit(
            Regressor(), data, output_dir=str(tmp_path / name), max_steps=16, per_device_train_batch_size=4,
            dataloader_num_workers=2, save_strategy="steps", save_steps=3, logging_steps=1, **more,
        )  # fmt: skip

    whole, cut = made("whole"), made("cut", callbacks=[StopAt(14)])
    whole.train()
    cut.train()
    resumed = made("cut")
    resumed.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-12")
    assert logs_of(resumed) == logs_of(whole)
