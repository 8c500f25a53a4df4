"""Epochs and evaluations that end early: which samples they take, on any number of ranks, and how long the run is."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stratagem import Callback, Fit, FitArguments
from stratagem.framework.data import DataStream, limit_evaluation, make_stream
from stratagem.framework.data.stand_in import StandIn
from stratagem.framework.run.plan import Plan
from stratagem.strategies import Strategy
from tiny import MakeFit, Numbers, NumberStream, Regressor, RowStream, logs_of, parameters_of, regression_rows
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

# (ranks, micro-batch size, accumulation) of one global batch of 8.
SPLITS = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 4, 1), (2, 2, 2), (2, 1, 4), (4, 2, 1), (4, 1, 2)]
LIMITS = st.one_of(st.integers(1, 9), st.floats(0.01, 1.0), st.just(1.0))


class Sized(NumberStream):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return self.count


class OwnBatches(BatchSampler):
    """A batch sampler that isn't torch's own, so that a loader is taken as it is."""


def data_of(kind: str, count: int) -> Any:
    """Numbers up to a count; a ready loader's come in batches of 2."""
    if kind == "loader":
        return DataLoader(Numbers(count), batch_sampler=OwnBatches(SequentialSampler(Numbers(count)), 2, False))
    return {"map": Numbers, "iterable": NumberStream, "sized": Sized}[kind](count)


def args_of(split: tuple[int, int, int], **arguments: Any) -> FitArguments:
    return FitArguments(per_device_train_batch_size=split[1], gradient_accumulation_steps=split[2], **arguments)


def streams_of(data: Any, split: tuple[int, int, int], training: bool = True, **arguments: Any) -> list[DataStream]:
    """The stream of each rank."""
    streams = []
    for rank in range(split[0]):
        strategy = Strategy()
        strategy.data_rank, strategy.data_size = rank, split[0]
        streams.append(make_stream(data, args_of(split, **arguments), strategy, training=training))
    return streams


def updates_of(streams: list[DataStream], split: tuple[int, int, int], epoch: int) -> list[list[int]]:
    """The samples of each update over all ranks, sorted."""
    by_rank = []
    for stream in streams:
        batches = [[] if isinstance(batch, StandIn) else batch.tolist() for batch in stream.epoch(epoch)]
        starts = range(0, len(batches), split[2])
        by_rank.append([list(itertools.chain(*batches[start : start + split[2]])) for start in starts])
    return [sorted(itertools.chain(*parts)) for parts in zip(*by_rank, strict=True)]


def batches_of(limit: int | float, whole: int) -> int:
    """How many of all batches a limit leaves, worked out apart: a fraction is rounded down, to one at least."""
    return min(limit, whole) if isinstance(limit, int) else max(1, int(limit * whole + 1e-6))


@given(
    kind=st.sampled_from(["map", "sized", "loader"]),
    count=st.integers(1, 90),
    limit=LIMITS,
    splits=st.tuples(st.sampled_from(SPLITS), st.sampled_from(SPLITS)),
    epochs=st.sampled_from([1.0, 0.5, 2.0, 2.3]),
    cut=st.integers(0, 8),
)
def test_an_epoch_is_its_first_updates_however_they_are_split(
    kind: str, count: int, limit: int | float, splits: Any, epochs: float, cut: int
) -> None:
    """Over ranks, micro-batches and accumulation; counted by the plan; gone on with from any update by any other."""
    alone = (1, 8, 1)
    if kind == "loader":  # whose batches of 2 are an update of 8 by these
        alone, *splits = ((ranks, 2, 4 // ranks) for ranks, _, _ in (alone, *splits))
    first, second = splits
    data = data_of(kind, count)
    whole = updates_of(streams_of(data, alone), alone, 1)
    expected = whole[: batches_of(limit, len(whole))]
    assert updates_of(streams_of(data, first, limit_train_batches=limit), first, 1) == expected

    plan = Plan.of(args_of(first, limit_train_batches=limit, num_train_epochs=epochs, warmup_steps=0))
    stream = streams_of(data, first, limit_train_batches=limit)[0]
    settled = plan.settled(stream)
    assert settled.args.max_steps == -(-len(expected) * epochs // 1)
    assert settled.num_train_epochs == -(-epochs // 1)
    assert -(-len(stream) // first[2]) == len(expected)

    cut = min(cut, len(expected))
    begun = streams_of(data, first, limit_train_batches=limit)
    handed = [stream.epoch(1) for stream in begun]
    for batches in handed:
        for _ in range(cut * first[2]):
            next(batches, None)
    assert begun[0].fraction() == pytest.approx(min(1.0, cut / len(expected)), abs=1 / len(expected))
    rest = streams_of(data, second, limit_train_batches=limit)
    for stream in rest:
        stream.load_state_dict(begun[0].state_dict())
    assert updates_of(rest, second, 1) == expected[cut:]


@given(count=st.integers(1, 60), limit=st.integers(1, 9), split=st.sampled_from(SPLITS))
def test_a_stream_without_a_length_is_cut_and_gives_an_epoch_its_length(
    count: int, limit: int, split: tuple[int, int, int]
) -> None:
    data = NumberStream(count)
    expected = [list(range(start, min(start + 8, count, 8 * limit))) for start in range(0, min(count, 8 * limit), 8)]
    streams = streams_of(data, split, limit_train_batches=limit)
    assert updates_of(streams, split, 0) == expected
    plan = Plan.of(args_of(split, limit_train_batches=limit, num_train_epochs=2.0)).settled(streams[0])
    assert plan.args.max_steps == 2 * limit


def test_a_stream_isnt_read_beyond_its_limit() -> None:
    class Endless(IterableDataset):
        read = 0

        def __iter__(self) -> Iterator[int]:
            for number in itertools.count():
                Endless.read += 1
                yield number

    split = (1, 4, 2)
    stream = streams_of(Endless(), split, limit_train_batches=3)[0]
    assert [len(update) for update in updates_of([stream], split, 0)] == [8, 8, 8]
    assert Endless.read == 24


def test_workers_that_share_an_iterable_end_at_the_limit_too() -> None:
    split = (1, 4, 2)
    stream = streams_of(NumberStream(1000), split, limit_train_batches=2, dataloader_num_workers=2)[0]
    assert [len(update) for update in updates_of([stream], split, 0)] == [8, 8]
    assert stream.position == 16


@pytest.mark.parametrize("name", ["limit_train_batches", "overfit_batches"])
def test_a_fraction_of_a_stream_without_a_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=0.5 is a fraction, and the data has no length.*{name}=10"):
        streams_of(NumberStream(9), (1, 4, 1), **{name: 0.5})


@given(
    kind=st.sampled_from(["map", "iterable", "sized", "loader"]),
    count=st.integers(1, 90),
    limit=LIMITS,
    ranks=st.sampled_from([1, 2, 4]),
)
def test_an_evaluation_has_the_same_samples_on_any_number_of_ranks(
    kind: str, count: int, limit: int | float, ranks: int
) -> None:
    if kind == "iterable" and isinstance(limit, float):
        return  # refused
    split, unit = (ranks, 1, 1), 2 if kind == "loader" else 3
    streams = streams_of(data_of(kind, count), split, training=False, per_device_eval_batch_size=3)
    for stream in streams:
        limit_evaluation(stream, FitArguments(limit_eval_batches=limit))
    found = sorted(itertools.chain(*updates_of(streams, split, 0)))
    assert found == list(range(min(count, unit * batches_of(limit, -(-count // unit)))))


def test_each_epoch_has_other_samples_where_the_order_is_drawn_anew() -> None:
    stream = streams_of(Numbers(100), (1, 8, 1), limit_train_batches=2)[0]
    first, second = (list(itertools.chain(*updates_of([stream], (1, 8, 1), epoch))) for epoch in (0, 1))
    assert len(first) == len(second) == 16
    assert set(first) != set(second)
    assert max(first) > 16  # of all the data, not of its beginning


@pytest.mark.parametrize(
    "data",
    [
        Numbers(50),
        DataLoader(Numbers(50), batch_size=4, shuffle=True),
        RowStream(list(range(50)), shuffle=True),
        DataLoader(Numbers(50), batch_sampler=OwnBatches(RandomSampler(Numbers(50)), 4, False)),
    ],
    ids=["dataset", "loader", "shuffling stream", "own batches"],
)
def test_overfitting_has_the_same_updates_each_epoch(data: Any) -> None:
    split = (1, 4, 2)
    stream = streams_of(data, split, overfit_batches=2)[0]
    first, second = updates_of([stream], split, 0), updates_of([stream], split, 1)
    assert first == second
    assert [len(update) for update in first] == [8, 8]
    if isinstance(data, Numbers) or getattr(data, "batch_size", None) == 4:
        assert first == [list(range(8)), list(range(8, 16))]


def test_a_loader_with_a_generator_of_its_own_cant_be_overfitted() -> None:
    sampler = RandomSampler(Numbers(50), generator=torch.Generator())
    with pytest.raises(ValueError, match=r"generator of its own.*give Fit the dataset itself"):
        streams_of(DataLoader(Numbers(50), batch_size=4, sampler=sampler), (1, 4, 1), overfit_batches=2)


# In a Fit.


class Samples(Callback):
    """The losses of evaluations, and the names of their metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_evaluate(self, *context: Any, metrics: Any, **_: Any) -> None:
        self.metrics.append(dict(metrics))


def mean_loss(module: Regressor, rows: list[Any]) -> float:
    with torch.no_grad():
        return sum(float(module.loss(module(row["x"][None]), {"y": row["y"][None]})) for row in rows) / len(rows)


def test_a_limited_run_is_as_long_as_its_updates(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(), regression_rows(40), num_train_epochs=3.0, limit_train_batches=2, per_device_train_batch_size=4,
        logging_strategy="epoch",
    )  # fmt: skip
    assert fit.train().global_step == 6
    assert [log["epoch"] for log in logs_of(fit)] == [1.0, 2.0, 3.0]


def test_evaluations_are_limited_and_predictions_are_whole(make_fit: MakeFit) -> None:
    rows = regression_rows(40)
    fit = make_fit(
        Regressor(), eval_data={"a": rows, "b": rows[10:]}, limit_eval_batches=2, per_device_eval_batch_size=3
    )
    found = fit.evaluate()
    assert found["eval_a_loss"] == pytest.approx(mean_loss(fit.module, rows[:6]), rel=1e-5)  # type: ignore[arg-type]
    assert found["eval_b_loss"] == pytest.approx(mean_loss(fit.module, rows[10:16]), rel=1e-5)  # type: ignore[arg-type]
    assert len(fit.predict(rows).predictions) == 40


@pytest.mark.parametrize("eval_data", [None, regression_rows(9)])
def test_overfitting_evaluates_on_what_it_trains_on(make_fit: MakeFit, eval_data: Any) -> None:
    rows, seen = regression_rows(40), Samples()
    fit = make_fit(
        Regressor(), rows, eval_data, overfit_batches=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=3.0, eval_strategy="epoch", shuffle=True, callbacks=[seen],
    )  # fmt: skip
    assert fit.train().global_step == 6
    assert len(seen.metrics) == 3
    assert seen.metrics[-1]["eval_loss"] == pytest.approx(mean_loss(fit.module, rows[:8]), rel=1e-5)  # type: ignore[arg-type]


def test_overfitting_keeps_the_names_of_evaluation_sets(make_fit: MakeFit) -> None:
    rows = regression_rows(12)
    fit = make_fit(Regressor(), rows, {"a": rows[:2], "b": rows[3:]}, overfit_batches=1, per_device_train_batch_size=4)
    found = fit.evaluate()
    assert found["eval_a_loss"] == found["eval_b_loss"] == pytest.approx(mean_loss(fit.module, rows[:4]), rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [3, 0.5])
def test_a_limited_run_goes_on_exactly(make_fit: MakeFit, limit: Any) -> None:
    def make(**arguments: Any) -> Fit:
        torch.manual_seed(0)
        return make_fit(
            Regressor(), regression_rows(26), num_train_epochs=3.0, limit_train_batches=limit, save_steps=2,
            per_device_train_batch_size=4, shuffle=True, save_strategy="steps", logging_steps=1, **arguments,
        )  # fmt: skip

    whole = make()
    whole.train()
    expected, directory = parameters_of(whole.module), whole.args.output_dir
    again = make()
    again.train(resume_from_checkpoint=f"{directory}/checkpoint-4")  # in the middle of the second epoch
    assert again.state.global_step == 9
    assert logs_of(again) == logs_of(whole)
    for name, tensor in parameters_of(again.module).items():
        assert torch.equal(tensor, expected[name])


def test_a_run_goes_on_with_other_epochs(make_fit: MakeFit) -> None:
    """Two epochs of 3 updates, then the third of 5."""
    options: dict[str, Any] = {"num_train_epochs": 3.0, "per_device_train_batch_size": 4, "save_strategy": "epoch"}
    first = make_fit(Regressor(), regression_rows(26), limit_train_batches=3, **options)
    first.train()
    found = make_fit(Regressor(), regression_rows(26), limit_train_batches=5, **options)
    found.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-6")
    assert (found.state.global_step, found.state.epoch) == (11, 3.0)


def test_a_shorter_epoch_cant_go_on_beyond_its_end(make_fit: MakeFit) -> None:
    options: dict[str, Any] = {"num_train_epochs": 1.0, "per_device_train_batch_size": 4, "save_strategy": "steps"}
    first = make_fit(Regressor(), regression_rows(26), save_steps=3, **options)
    first.train()
    found = make_fit(Regressor(), regression_rows(26), limit_train_batches=2, **options)
    with pytest.raises(Exception, match="the checkpoint stands at 12, and there are 8"):
        found.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit_train_batches": 0}, "limit_train_batches=0: must be a number of batches, at least 1, or a fraction"),
        ({"limit_eval_batches": 1.5}, "limit_eval_batches=1.5: must be a number of batches"),
        ({"limit_eval_batches": "many"}, "limit_eval_batches='many': must be a number of batches"),
        ({"limit_train_batches": True}, "limit_train_batches=True: must be"),
        ({"overfit_batches": 2, "limit_eval_batches": 1}, "overfit_batches=2: trains and evaluates on these"),
        ({"overfit_batches": 2, "train_sampling_strategy": "group_by_length"}, "overfit_batches=2: keeps the data's"),
        ({"fast_dev_run": -1}, "fast_dev_run=-1: must be a number of updates"),
    ],
)
def test_limits_that_cant_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="can't work") as caught:
        FitArguments(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("None", None)])
def test_a_command_line_tells_a_number_of_batches_from_a_fraction(text: str, number: Any) -> None:
    found = FitArguments(limit_train_batches=text).limit_train_batches
    assert (found, type(found)) == (number, type(number))
