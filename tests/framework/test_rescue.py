"""save_on_exception: what fails between two updates leaves the last whole state, and nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback
from stratagem.framework.run.rescue import RescueWarning
from tiny import Dropping, MakeFit, NoisyRows, RowStream, logs_of, regression_rows

RUN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 100,
}


def failing_in(event: str, step: int) -> Callback:
    class Fails(Callback):
        pass

    def fail(self: Any, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == step:
            raise ZeroDivisionError("in a callback")

    setattr(Fails, event, fail)
    return Fails()


class Rows(NoisyRows):
    """Rows with random noise, one of which can't be read the first time it is asked for when armed."""

    def __init__(self, count: int, bad: int) -> None:
        super().__init__(count)
        self.bad = bad

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            self.bad = -1
            torch.rand(3)  # the random numbers have moved on
            raise OSError("can't be read")
        return super().__getitem__(index)


class Stream(RowStream):
    """The same as an iterable."""

    bad = -1

    def __iter__(self) -> Any:
        for place, row in enumerate(super().__iter__()):
            if place == self.bad:
                self.bad = -1
                raise OSError("can't be read")
            yield row


def checkpoints(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*"))


def whole_run(make_fit: MakeFit, data: Any, **options: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    fit = make_fit(Dropping(), data, output_dir="unused", **{**RUN, "save_strategy": "no", **options})
    fit.train()
    return logs_of(fit)


def resumed(make_fit: MakeFit, data: Any, **options: Any) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    fit = make_fit(Dropping(), data, **{**RUN, "save_strategy": "no", **options})
    fit.train(resume_from_checkpoint=True)
    return logs_of(fit)


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_prediction_step"])
def test_a_callback_that_raises_between_two_updates(make_fit: MakeFit, tmp_path: Path, event: str) -> None:
    evaluates = {"eval_strategy": "steps", "eval_steps": 3}
    rows = regression_rows(3)
    fit = make_fit(
        Dropping(), NoisyRows(40), rows, callbacks=[failing_in(event, 3)], save_on_exception=True, **evaluates, **RUN
    )
    with pytest.raises(ZeroDivisionError, match="in a callback"):
        fit.train()
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    torch.manual_seed(0)
    options = {**RUN, **evaluates, "save_strategy": "no"}
    expected = make_fit(Dropping(), NoisyRows(40), rows, output_dir="unused", **options)
    expected.train()
    found = make_fit(Dropping(), NoisyRows(40), rows, **options)
    found.train(resume_from_checkpoint=True)
    later = [log for log in logs_of(expected) if log["step"] > 3]
    assert later and [log for log in logs_of(found) if log["step"] > 3] == later


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"])
def test_the_middle_of_an_update_is_never_saved(make_fit: MakeFit, tmp_path: Path, event: str) -> None:
    fit = make_fit(Dropping(), NoisyRows(40), callbacks=[failing_in(event, 3)], save_on_exception=True, **RUN)
    with pytest.raises(ZeroDivisionError), pytest.warns(RescueWarning, match="in the middle of update 4"):
        fit.train()
    assert checkpoints(tmp_path) == []


def test_nothing_is_saved_unless_asked_for(make_fit: MakeFit, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        make_fit(Dropping(), NoisyRows(40), callbacks=[failing_in("on_step_end", 3)], **RUN).train()
    assert checkpoints(tmp_path) == []


# In the order of the data, 4 rows an update: row 18 is the third of update 5, in its second micro-batch.
@pytest.mark.parametrize("bad", [18, 16])
def test_a_dataset_that_raises_once_costs_nothing(make_fit: MakeFit, tmp_path: Path, bad: int) -> None:
    fit = make_fit(Dropping(), Rows(40, bad), save_on_exception=True, **RUN)
    with pytest.raises(OSError, match="can't be read"):
        fit.train()
    assert checkpoints(tmp_path) == ["checkpoint-4"]
    assert resumed(make_fit, NoisyRows(40)) == whole_run(make_fit, NoisyRows(40))


@pytest.mark.parametrize("bad", [6, 0])  # in the second epoch, of 4 updates of 4 rows: its second update, and its first
def test_an_iterable_that_raises_in_its_second_epoch(make_fit: MakeFit, tmp_path: Path, bad: int) -> None:
    class SecondTime(Stream):
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            self.bad = bad if self.times == 2 else -1
            return super().__iter__()

    rows = regression_rows(16)
    fit = make_fit(Dropping(), SecondTime(rows, shuffle=True), save_on_exception=True, **RUN)
    with pytest.raises(OSError, match="can't be read"):
        fit.train()
    assert checkpoints(tmp_path) == [f"checkpoint-{4 + bad // 4}"]
    assert resumed(make_fit, Stream(rows, shuffle=True)) == whole_run(make_fit, Stream(rows, shuffle=True))


def test_an_exception_after_a_checkpoint_saves_no_other(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**RUN, "save_steps": 3, "async_save": True}
    fit = make_fit(Dropping(), NoisyRows(40), callbacks=[failing_in("on_save", 3)], save_on_exception=True, **options)
    with pytest.raises(ZeroDivisionError):
        fit.train()
    fit.close()
    assert checkpoints(tmp_path) == ["checkpoint-3"]


def test_with_async_save_the_checkpoint_comes_before_the_exception_goes_on(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**RUN, "save_steps": 2, "async_save": True, "save_on_exception": True}
    fit = make_fit(Dropping(), NoisyRows(40), callbacks=[failing_in("on_step_end", 3)], **options)
    with pytest.raises(ZeroDivisionError):
        fit.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert json.loads((tmp_path / "output" / "checkpoint-3" / "state.json").read_text())["progress"]["global_step"] == 3
