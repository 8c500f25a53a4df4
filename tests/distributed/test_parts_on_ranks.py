"""Iterable data that gives each rank a part: read once over all ranks, stopped in step, weighed by items."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from tiny import StopAt
from torch.utils.data import DataLoader, IterableDataset
from training import Tagger, make_fit, token_rows, train

ROWS, LENGTHS = 31, (9, 22)  # of two parts
BATCH = 2


class Parts(IterableDataset):
    """Rows of which each rank has its own, and how many of them this process has read."""

    shares_among_ranks = True

    def __init__(self, lengths: tuple[int, ...] = LENGTHS, fails_on: int = -1) -> None:
        self.lengths, self.fails_on = lengths, fails_on
        self.index = 0
        self.read: list[int] = []
        self.place = 0

    def shard(self, num_shards: int, index: int) -> "Parts":
        part = copy.copy(self)  # it notes what it reads in the same list
        assert num_shards == len(self.lengths)
        part.index = index
        return part

    def __iter__(self) -> Iterator[Any]:
        begin = sum(self.lengths[: self.index])
        rows = token_rows(ROWS)
        for number in range(begin + self.place, begin + self.lengths[self.index]):
            if number == self.fails_on:
                raise OSError(5, "the disk is gone", "rows.bin")
            self.read.append(number)
            self.place += 1
            yield rows[number]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def batches_of_both(accumulation: int = 1) -> list[list[int]]:
    """The rows of each update over both ranks."""
    parts = list(range(LENGTHS[0])), list(range(LENGTHS[0], ROWS))
    size = BATCH * accumulation
    updates = -(-max(LENGTHS) // size)
    return [[row for part in parts for row in part[i * size : (i + 1) * size]] for i in range(updates)]


def train_on_parts(workers: int = 0, **arguments: Any) -> dict[str, Any]:
    """A run of one epoch, and what this rank has read in it."""
    data = Parts()
    found = train(data=data, per_device_train_batch_size=BATCH, dataloader_num_workers=workers, **arguments)
    return {**found, "read": data.read}


@pytest.mark.parametrize(("strategy", "accumulation"), [("ddp", 1), ("fsdp2", 3)])
def test_unequal_parts_train_as_one_process_does(ranks: dict[int, Ranks], strategy: str, accumulation: int) -> None:
    updates = batches_of_both(accumulation)
    expected = train(data=DataLoader(token_rows(ROWS), batch_sampler=updates), max_steps=len(updates))  # type: ignore[arg-type]
    found = ranks[2].run(
        train_on_parts, strategy=strategy, max_steps=len(updates), gradient_accumulation_steps=accumulation
    )
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    # Each row is read by one rank, once.
    assert [rank["read"] for rank in found] == [list(range(9)), list(range(9, 31))]


def resumed(directory: str, workers: int) -> dict[str, Any]:
    """A run that was stopped and resumed, beside one that wasn't: losses, and what was read after the resume."""
    arguments: dict[str, Any] = {"strategy": "ddp", "max_steps": 18, "workers": workers}
    saving = {"save_strategy": "steps", "save_steps": 8, "output_dir": directory}
    whole = train_on_parts(**arguments)
    train_on_parts(**{**arguments, **saving, "callbacks": [StopAt(9)]})
    rest = train_on_parts(**{**arguments, "output_dir": directory, "resume": Path(directory) / "checkpoint-8"})
    return {"whole": whole["loss"], "rest": rest["loss"], "read": rest["read"]}


def test_a_resume_goes_on_in_each_ranks_part(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    """Update 8 is within the first of two epochs, of 11 updates, and rank 0's 9 rows have ended by then."""
    first, second = ranks[2].run(resumed, directory=str(tmp_path), workers=0)
    assert first["rest"] == first["whole"] and len(first["rest"]) > 14  # two or so updates have no label
    # Rank 0 reads one batch to stand in; rank 1 goes on at the next row. Then comes the second epoch.
    assert first["read"] == [0, 1, *range(9)]
    assert second["read"][:6] == list(range(25, 31)) and second["read"][6] == 9
    with pytest.raises(Exception, match="another number of ranks, each of which has a part of its own: 1 here, 2 in"):
        train(data=Parts((31,)), max_steps=18, per_device_train_batch_size=BATCH, resume=tmp_path / "checkpoint-8")


def evaluated(fails_on: int = -1) -> Any:
    """The loss over the parts and the number of predictions, or the error."""
    fit = make_fit(Tagger(), None, strategy="ddp", per_device_eval_batch_size=BATCH)
    try:
        loss = fit.evaluate(Parts(fails_on=fails_on))["eval_loss"]
        return [loss, len(fit.predict(Parts()).predictions), fit.evaluate(token_rows(ROWS))["eval_loss"]]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_an_evaluation_of_unequal_parts_is_that_of_the_whole(ranks: dict[int, Ranks]) -> None:
    for loss, count, whole in ranks[2].run(evaluated):
        assert loss == pytest.approx(whole, rel=1e-6) and count == ROWS
    first, second = ranks[2].run(evaluated, fails_on=25)
    assert second == "OSError: [Errno 5] the disk is gone: 'rows.bin'"
    assert first == f"OtherRankError: Rank 1 failed while it read its evaluation data: {second}"


def failing() -> str:
    """What a run ends with whose data fails on rank 1 in the third micro-batch of an update."""
    try:
        train(data=Parts(fails_on=13), strategy="fsdp2", max_steps=8, gradient_accumulation_steps=9,
              per_device_train_batch_size=BATCH)  # fmt: skip
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_part_that_fails_ends_the_run_on_both(ranks: dict[int, Ranks]) -> None:
    first, second = ranks[2].run(failing)
    assert second == "OSError: [Errno 5] the disk is gone: 'rows.bin'"
    assert first == f"OtherRankError: Rank 1 failed while it read its train_data: {second}"
