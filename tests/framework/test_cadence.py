"""When a log, an evaluation and a checkpoint are due: updates worked out by hand, also for fractions of the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, FitArguments, TrainModule
from stratagem.framework.fields.cadence import in_updates
from tiny import Dropping, MakeFit, Regressor, StopAt, parameters_of, regression_rows
from torch import Tensor


class Due(Callback):
    """Writes down the updates at which something happened."""

    def __init__(self) -> None:
        self.logs: list[int] = []
        self.evaluations: list[int] = []
        self.saves: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **context: Any) -> None:
        if "loss" in logs:
            self.logs.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.evaluations.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, path: Path, **context: Any) -> None:
        self.saves.append(int(path.name.removeprefix("checkpoint-")))


FRACTIONS: dict[str, Any] = {
    "logging_steps": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_strategy": "steps",
    "save_steps": 0.5,
}


def run(make_fit: MakeFit, resume: Any = None, **options: Any) -> Due:
    due = Due()
    callbacks = [due, *options.pop("callbacks", ())]
    options = {**FRACTIONS, "per_device_train_batch_size": 2, **options}
    make_fit(Regressor(), regression_rows(7), regression_rows(2), callbacks=callbacks, **options).train(resume)
    return due


def test_fractions_are_of_the_run(make_fit: MakeFit) -> None:
    # 0.3, 0.25 and 0.5 of 10 updates are 3, 3 (2.5, rounded up) and 5; all three come at the end of the run, too.
    due = run(make_fit, max_steps=10)
    assert (due.logs, due.evaluations, due.saves) == ([3, 6, 9, 10], [3, 6, 9, 10], [5, 10])


def test_fractions_are_of_a_run_that_counts_epochs(make_fit: MakeFit) -> None:
    # 7 rows by 2 are 4 updates an epoch, 12 in three: 0.3, 0.25 and 0.5 of them are 4 (3.6, rounded up), 3 and 6.
    due = run(make_fit, num_train_epochs=3)
    assert (due.logs, due.evaluations, due.saves) == ([4, 8, 12], [3, 6, 9, 12], [6, 12])


def test_a_resumed_run_keeps_the_cadence(make_fit: MakeFit) -> None:
    run(make_fit, max_steps=10, callbacks=[StopAt(7)])
    due = run(make_fit, max_steps=10, resume=True)  # from checkpoint-5
    assert (due.logs, due.evaluations, due.saves) == ([6, 9, 10], [6, 9, 10], [10])


def test_a_trial_of_another_length_has_its_own_cadence(make_fit: MakeFit) -> None:
    due = Due()
    fit = make_fit(Regressor(), regression_rows(7), max_steps=10, logging_steps=0.5, callbacks=[due])
    fit.train()
    fit.train(trial={"max_steps": 4})
    assert due.logs == [5, 10, 2, 4]


@pytest.mark.parametrize(
    ("steps", "max_steps", "expected"),
    [
        (0.001, 10, 1),
        (0.3, 25, 8),
        (0.07, 100, 7),
        (0.1, 30, 3),
        (1 / 3, 30, 10),
        (0.999, 10, 10),
        (1, 7, 1),
        (4, 9, 4),
    ],
)
def test_updates_of_a_fraction(steps: float, max_steps: int, expected: int) -> None:
    assert in_updates(steps, max_steps) == expected


BEST: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}


def test_each_checkpoint_has_an_evaluation_for_fractions_too(make_fit: MakeFit) -> None:
    due = run(make_fit, max_steps=25, eval_steps=0.2, save_steps=0.4, **BEST)
    assert (due.evaluations, due.saves) == ([5, 10, 15, 20, 25], [10, 20, 25])
    # 2 and 5 of 20; known at once where the length is given, else when Fit has worked it out: 4 updates by 5 epochs.
    told = r"every multiple of 2 updates; here every 5"
    with pytest.raises(ValueError, match=told):
        FitArguments(max_steps=20, eval_steps=0.1, save_steps=0.25, **BEST)
    unknown = FitArguments(num_train_epochs=5, eval_steps=0.1, save_steps=0.25, **BEST)
    with pytest.raises(ValueError, match=told):
        run(make_fit, args=unknown, **{**BEST, "num_train_epochs": 5, "eval_steps": 0.1, "save_steps": 0.25})


@pytest.mark.parametrize("module", [Regressor, Dropping])
def test_an_evaluation_inside_an_accumulation_window_changes_nothing(
    make_fit: MakeFit, module: type[TrainModule]
) -> None:
    class EvaluateInside(Callback):
        def on_substep_end(self, *args: Any, fit: Any, **context: Any) -> None:
            before = {name: p.grad.clone() for name, p in fit.module.named_parameters()}
            fit.evaluate()
            found.append(all(torch.equal(p.grad, before[name]) for name, p in fit.module.named_parameters()))

    def final(callbacks: list[Callback]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        made = module()
        fit = make_fit(
            made,
            regression_rows(24),
            regression_rows(5),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            callbacks=callbacks,
        )
        fit.train()
        return parameters_of(made)

    found: list[bool] = []
    expected, interrupted = final([]), final([EvaluateInside()])
    assert found == [True] * 8  # two inside each update
    for name, value in expected.items():
        assert torch.equal(interrupted[name], value), name
