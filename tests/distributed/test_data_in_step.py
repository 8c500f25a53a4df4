"""Data that ends, or fails, on one rank alone: every rank hears of it, before a collective that the other isn't in."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from stratagem import Fit
from torch.utils.data import IterableDataset
from training import Tagger, make_fit, token_rows, train

STRATEGIES = ["ddp", "fsdp2"]


class Rows(IterableDataset):
    """As many rows as this rank is told, and an error after them where one is given."""

    def __init__(self, counts: list[int], fails_on: int = -1) -> None:
        rank = int(os.environ["RANK"])
        self.rows = token_rows()[1 : 1 + counts[rank]]
        self.fails = rank == fails_on

    def __iter__(self) -> Iterator[Any]:
        yield from self.rows
        if self.fails:
            raise OSError(5, "the disk is gone", "rows.bin")


def caught(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train_on(counts: list[int], strategy: str, accumulation: int = 1, fails_on: int = -1) -> str:
    """What training on so many rows a rank ends with."""
    sizes = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    return caught(lambda: train(data=Rows(counts, fails_on), strategy=strategy, **sizes))


def evaluate_on(counts: list[int], strategy: str, fails_on: int = -1, predicts: bool = False) -> str:
    """What an evaluation or prediction of so many rows a rank ends with."""
    fit = make_fit(Tagger(), None, strategy=strategy, per_device_eval_batch_size=2)
    data = Rows(counts, fails_on)
    return caught(lambda: fit.predict(data) if predicts else fit.evaluate(data))


# 2 samples a rank and micro-batch: on two ranks 20 rows are 5 micro-batches, and 28 are 7.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_iterable_that_ends_earlier_on_one_rank_is_an_error_on_both(ranks: dict[int, Ranks], strategy: str) -> None:
    for said in ranks[2].run(train_on, counts=[28, 20], strategy=strategy):
        assert said.startswith("ValueError: The ranks' train_data isn't equally long: rank 1 ran out after 5 micro-bat")
        assert "(rank 0 6)" in said and "Every rank must iterate over the whole of it" in said


def test_ranks_with_fewer_micro_batches_in_an_update_are_found_before_they_compute(ranks: dict[int, Ranks]) -> None:
    # 7 and 5 micro-batches in groups of 3: the second group has 3 on one rank and 2 on the other.
    for said in ranks[2].run(train_on, counts=[20, 28], strategy="fsdp2", accumulation=3):
        assert "rank 0 ran out after 5 micro-batches of this epoch" in said and "(rank 1 6)" in said


def test_last_micro_batches_of_other_sizes_are_found(ranks: dict[int, Ranks]) -> None:
    for said in ranks[2].run(train_on, counts=[20, 19], strategy="ddp"):
        assert "hold, over all ranks, 4 samples as rank 0 sees it, 3 samples as rank 1 sees it" in said


@pytest.mark.slow
def test_the_one_rank_of_four_that_runs_out_is_named(ranks: dict[int, Ranks]) -> None:
    # With the counts 1, 2, 2, 3 in a sum, some ranks would take themselves for the average.
    for said in ranks[4].run(train_on, counts=[16, 24, 24, 32], strategy="ddp", accumulation=4):
        assert "rank 0 ran out after 2 micro-batches of this epoch" in said
        assert "(rank 1 3, rank 2 3, rank 3 4)" in said


def test_equal_iterables_end_on_all_ranks(ranks: dict[int, Ranks]) -> None:
    assert ranks[2].run(train_on, counts=[19, 19], strategy="fsdp2", accumulation=2) == ["no error"] * 2


def test_an_empty_iterable_on_one_rank(ranks: dict[int, Ranks]) -> None:
    for said in ranks[2].run(train_on, counts=[20, 0], strategy="ddp"):
        assert "rank 1 ran out after 0 micro-batches" in said


def test_data_that_fails_on_one_rank_ends_the_run_on_both_with_its_error(ranks: dict[int, Ranks]) -> None:
    first, second = ranks[2].run(train_on, counts=[20, 14], strategy="fsdp2", fails_on=1)
    assert second == "OSError: [Errno 5] the disk is gone: 'rows.bin'"
    assert first == f"OtherRankError: Rank 1 failed while it read its train_data: {second}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("predicts", [False, True])
def test_an_evaluation_of_unequal_iterables_is_an_error(ranks: dict[int, Ranks], strategy: str, predicts: bool) -> None:
    # 9 and 11 micro-batches: the ranks differ in the second group that is read ahead.
    for said in ranks[2].run(evaluate_on, counts=[36, 44], strategy=strategy, predicts=predicts):
        assert "The ranks' evaluation data isn't equally long: rank 0 ran out after 9 micro-batches" in said
    for said in ranks[2].run(evaluate_on, counts=[36, 36], strategy=strategy, predicts=predicts):
        assert said == "no error"


def test_evaluation_data_that_fails_on_one_rank(ranks: dict[int, Ranks]) -> None:
    first, second = ranks[2].run(evaluate_on, counts=[36, 36], strategy="fsdp2", fails_on=0)
    assert first == "OSError: [Errno 5] the disk is gone: 'rows.bin'"
    assert second == f"OtherRankError: Rank 0 failed while it read its evaluation data: {first}"


def search_over(directory: str, fails_on: int) -> list[Any]:
    """The states of two trials, the data of the first of which fails on one rank."""
    made: list[Rows] = []

    class Once(Rows):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            self.fails = False

        @property
        def fails(self) -> bool:
            return self.armed and len(made) == 1

        @fails.setter
        def fails(self, value: bool) -> None:
            self.armed = value

    def module_init(trial: Any) -> Tagger:
        if trial is not None:
            made.append(data)
        return Tagger(1)

    data = Once([40, 40], fails_on)
    fit = Fit(
        None, data, token_rows()[:8], strategy="ddp", module_init=module_init, output_dir=directory, max_steps=20,
        save_strategy="no", loggers=(), progress=False, per_device_train_batch_size=2,
    )  # fmt: skip
    found = fit.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}, n_trials=2, catch=(OSError,)
    )
    return [(trial.state, trial.error) for trial in found.trials]


@pytest.mark.slow
def test_a_search_goes_on_after_data_that_failed_on_one_rank(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    for states in ranks[2].run(search_over, directory=str(tmp_path), fails_on=1, seconds=120):
        assert states == [("failed", "OSError: [Errno 5] the disk is gone: 'rows.bin'"), ("complete", None)]
