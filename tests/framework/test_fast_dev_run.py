"""fast_dev_run: a few updates and evaluation batches of the run as it is, of which nothing is left behind."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Fit, FitArguments
from tiny import MakeFit, Regressor, logs_of, regression_rows


class Asking(Callback):
    """Asks for a checkpoint after each update, and counts what it hears of."""

    def __init__(self) -> None:
        self.updates, self.batches, self.saves, self.evaluations = 0, 0, 0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.updates += 1
        control.should_save = True

    def on_prediction_step(self, *context: Any, **_: Any) -> None:
        self.batches += 1

    def on_evaluate(self, *context: Any, **_: Any) -> None:
        self.evaluations += 1

    def on_save(self, *context: Any, **_: Any) -> None:
        self.saves += 1


REAL: dict[str, Any] = {
    # A real run: warmup longer than what is tried, the best checkpoint, the first evaluation late.
    "num_train_epochs": 5.0, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3,
    "lr_scheduler_type": "linear", "warmup_steps": 30, "save_strategy": "steps", "eval_strategy": "steps",
    "eval_steps": 20, "save_steps": 20, "load_best_model_at_end": True, "eval_delay": 40, "loggers": ("jsonl",),
    "save_on_exception": True, "logging_first_step": True,
}  # fmt: skip


@pytest.mark.parametrize(("given", "updates"), [(True, 1), (3, 3)])
@pytest.mark.parametrize("cadence", ["steps", "epoch"])
def test_a_few_updates_are_tried_and_nothing_is_left(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str], given: Any, updates: int, cadence: str
) -> None:
    heard, rows = Asking(), regression_rows(40)
    options = {**REAL, "eval_strategy": cadence, "save_strategy": cadence}
    if cadence == "epoch":
        options.update(eval_steps=None, eval_delay=1)
    fit = make_fit(Regressor(), rows, {"a": rows, "b": rows}, callbacks=[heard], fast_dev_run=given, **options)
    fit.train()
    assert (heard.updates, heard.evaluations, heard.batches, heard.saves) == (updates, 1, 2 * updates, 0)
    assert not Path(fit.args.output_dir).exists()
    assert "eval_a_loss" in logs_of(fit)[-1]
    said = capsys.readouterr().err
    assert re.search(
        rf"fast_dev_run={updates}: {updates} updates? of 100, evaluations of .* no checkpoints, no loggers", said
    )
    assert fit.control.stop_reason == f"fast_dev_run={updates}"
    fit.evaluate()
    assert not Path(fit.args.output_dir).exists()


def test_its_updates_are_those_of_the_real_run(make_fit: MakeFit) -> None:
    losses = []
    for tried in (0, 2):
        torch.manual_seed(0)
        fit = make_fit(
            Regressor(), regression_rows(40), fast_dev_run=tried, logging_steps=1, shuffle=True, max_steps=20,
            lr_scheduler_type="cosine", warmup_steps=5, per_device_train_batch_size=4,
        )  # fmt: skip
        fit.train()
        losses.append([(log["loss"], log["learning_rate"]) for log in logs_of(fit)][:2])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_run_shorter_than_what_is_tried_ends_as_ever(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(4), max_steps=2, fast_dev_run=5)
    assert fit.train().global_step == 2
    assert fit.control.stop_reason == ""


def test_an_exception_leaves_nothing_either(make_fit: MakeFit) -> None:
    class Failing(Callback):
        def on_step_begin(self, args: Any, state: Any, *context: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise ZeroDivisionError

    fit = make_fit(Regressor(), regression_rows(40), regression_rows(4), callbacks=[Failing()], fast_dev_run=3, **REAL)
    with pytest.raises(ZeroDivisionError):
        fit.train()
    assert not Path(fit.args.output_dir).exists()


@pytest.mark.parametrize("resume", [True, "somewhere"])
def test_it_has_nothing_to_go_on_from(make_fit: MakeFit, resume: Any) -> None:
    fit = make_fit(Regressor(), regression_rows(4), fast_dev_run=1)
    with pytest.raises(ValueError, match=r"fast_dev_run=1 tries the first updates.*Leave one of them out"):
        fit.train(resume_from_checkpoint=resume)


def test_a_search_and_a_trial_are_real_runs(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(4), regression_rows(4), fast_dev_run=1)
    with pytest.raises(ValueError, match="by which a search can't choose"):
        fit.hyperparameter_search(lambda trial: {})
    other = make_fit(Regressor(), regression_rows(4))
    with pytest.raises(ValueError, match=r"fast_dev_run can't be switched on by a trial. Write Fit\(fast_dev_run=2\)"):
        other.train(trial={"fast_dev_run": 2})


def test_true_is_one_update() -> None:
    assert FitArguments(fast_dev_run=True).fast_dev_run == 1
    assert FitArguments(fast_dev_run=False).to_dict()["fast_dev_run"] == 0


def test_deterministic_is_full_determinism(make_fit: MakeFit) -> None:
    assert FitArguments(deterministic=True) == FitArguments(full_determinism=True)
    assert FitArguments(deterministic=True).replace(seed=1).full_determinism
    assert not FitArguments(full_determinism=True).replace(deterministic=False).full_determinism
    seen: list[bool] = []

    class Looking(Callback):
        def on_step_begin(self, *context: Any, **_: Any) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    fit: Fit = make_fit(Regressor(), regression_rows(4), max_steps=1, deterministic=True, callbacks=[Looking()])
    fit.train()
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="deterministic='warn': must be True or False"):
        FitArguments(deterministic="warn")  # type: ignore[arg-type]
