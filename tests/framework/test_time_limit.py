"""max_time: training ends before its time is over, saved and evaluated, and says why; what was used is kept."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Control, Fit, FitArguments
from stratagem.framework.fields import durations
from stratagem.framework.state import TrainState
from stratagem.framework.switches.time_limit import TimeLimit
from tiny import MakeFit, Regressor, StopAt, parameters_of, regression_rows


class Slow(Callback):
    """Takes its time in every update, evaluation and save."""

    def __init__(self, update: float, evaluation: float = 0.0, save: float = 0.0) -> None:
        self.update, self.evaluation, self.save = update, evaluation, save
        self.evaluated: list[int] = []

    def on_step_begin(self, *context: Any, **_: Any) -> None:
        time.sleep(self.update)

    def on_prediction_step(self, *context: Any, **_: Any) -> None:
        time.sleep(self.evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated.append(state.global_step)

    def state_dict(self) -> dict[str, Any]:
        time.sleep(self.save)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def make(make_fit: MakeFit, slow: Slow, *callbacks: Callback, **arguments: Any) -> Fit:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "max_steps": 1000, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2000,
        "per_device_eval_batch_size": 40, "callbacks": [slow, *callbacks], "num_train_epochs": 1000.0,
    }  # fmt: skip
    return make_fit(Regressor(), regression_rows(40), regression_rows(4), **{**options, **arguments})


@pytest.fixture(autouse=True, scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first save of a process imports for seconds, for which limits of seconds keep no time."""
    directory = str(tmp_path_factory.mktemp("first"))
    options: dict[str, Any] = {"max_steps": 2, "async_save": True, "progress": False, "loggers": ()}
    Fit(Regressor(), regression_rows(4), output_dir=directory, **options).train()


def checkpoints(fit: Fit) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in Path(fit.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (
                {"async_save": True},
                {"save_strategy": "epoch"},
                {"eval_strategy": "steps", "eval_steps": 7},
                {"eval_strategy": "epoch", "save_strategy": "best"},
                {"eval_strategy": "steps", "eval_steps": 2000, "save_steps": 3, "load_best_model_at_end": False},
            )
        ),
    ],
    ids=str,
)
def test_training_ends_in_time_with_a_checkpoint(make_fit: MakeFit, arguments: dict[str, Any]) -> None:
    slow = Slow(0.02, 0.1, 0.05)
    fit = make(make_fit, slow, max_time=3.0, **arguments)
    began = time.monotonic()
    step = fit.train().global_step
    assert time.monotonic() - began < 3.0
    assert 5 < step < 1000
    assert checkpoints(fit)[-1] == step
    if "eval_strategy" in arguments:
        assert slow.evaluated[-1] == step
    assert fit.control.stop_reason.startswith("max_time=3.0 is nearly over: 0:00:0")


def test_without_checkpoints_it_ends_as_well(make_fit: MakeFit) -> None:
    fit = make(make_fit, Slow(0.02), max_time=timedelta(seconds=2), save_strategy="no")
    began = time.monotonic()
    assert 5 < fit.train().global_step < 1000
    assert time.monotonic() - began < 2.0
    assert checkpoints(fit) == []


def test_a_checkpoint_takes_until_it_is_there(tmp_path: Path) -> None:
    """Updates go on while it is written in the background."""
    limit = TimeLimit(1000.0)
    limit.lap()
    limit.on_save(FitArguments(), TrainState(global_step=3), Control())
    assert limit.save < 0.1
    for _ in range(5):
        time.sleep(0.05)
        limit.lap()
    limit.checkpoint_published(tmp_path / "checkpoint-2")  # an earlier one
    assert limit.save < 0.1
    limit.checkpoint_published(tmp_path / "checkpoint-3")
    assert limit.save >= 0.25


def test_what_was_used_counts_after_a_resume(make_fit: MakeFit) -> None:
    first = make(make_fit, Slow(0.05), StopAt(12), max_time=60.0, save_steps=12)
    first.train()
    used = first.callbacks.state_dict()["TimeLimit-0"]["seconds"]
    assert 0.6 < used < 10.0
    second = make(make_fit, Slow(0.05), max_time=used + 1.5)
    began = time.monotonic()
    steps = second.train(resume_from_checkpoint=True).global_step
    assert time.monotonic() - began < 1.6
    assert steps > 12


def test_a_run_whose_time_is_over_ends_at_once_and_a_longer_one_goes_on_exactly(make_fit: MakeFit) -> None:
    ended = make(make_fit, Slow(0.02), max_time=1.0)
    step = ended.train().global_step
    again = make(make_fit, Slow(0.02), max_time=1.0)
    assert again.train(resume_from_checkpoint=True).global_step == step
    assert again.control.stop_reason == "max_time=1.0 was used up before; raise it to go on"
    longer = make(make_fit, Slow(0.0), max_time="01:00:00", max_steps=step + 5)
    longer.train(resume_from_checkpoint=True)
    whole = make(make_fit, Slow(0.0), max_steps=step + 5, save_strategy="no")
    whole.train()
    expected = parameters_of(whole.module)
    for name, tensor in parameters_of(longer.module).items():
        assert torch.equal(tensor, expected[name])


def test_a_run_that_is_done_in_time_says_nothing(make_fit: MakeFit) -> None:
    fit = make(make_fit, Slow(0.0), max_time="00:10:00", max_steps=4)
    assert fit.train().global_step == 4
    assert fit.control.stop_reason == ""


@pytest.mark.slow
def test_an_evaluation_that_never_was_measured_has_time_kept_for_it(make_fit: MakeFit) -> None:
    """A tenth of the limit, as for a save."""
    slow = Slow(0.02, 0.1)
    fit = make(make_fit, slow, max_time=4.0, eval_strategy="steps", eval_steps=2000)
    began = time.monotonic()
    step = fit.train().global_step
    assert time.monotonic() - began < 4.0
    assert slow.evaluated == [step]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("02:30:00", 9000.0), ("1:02:30:00", 95400.0), ("00:00:00:05", 5.0), (90, 90.0), ("90", 90.0),
     ("26:00:00", 93600.0), (timedelta(days=1, hours=2), 93600.0), ("00:00:01.5", 1.5)],
)  # fmt: skip
def test_a_duration_is_written_as_one_likes(given: Any, seconds: float) -> None:
    found = FitArguments(max_time=given)
    assert durations.seconds(found.max_time) == seconds  # type: ignore[arg-type]
    assert FitArguments(**found.to_dict()) == found


@pytest.mark.parametrize("given", ["2:30", "two hours", "00:75:00", 0, -3.0, float("nan"), "00:00:00"])
def test_a_duration_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="max_time="):
        FitArguments(max_time=given)
