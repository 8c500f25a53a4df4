"""Learning-rate schedules: their values against formulas worked out by hand, and what they refuse."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stratagem import FitArguments
from stratagem.framework.optim.schedulers import SCHEDULERS, SHAPES, Schedule
from tiny import MakeFit, Regressor, logs_of, regression_rows
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

WARMUP, TOTAL = 4, 12  # 8 updates after warm-up


def rates(name: str, **options: Any) -> list[float]:
    return [SHAPES[name](update, WARMUP, TOTAL, **options) for update in range(TOTAL + 1)]


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("constant", "cosine_warmup_with_min_lr")])
def test_every_schedule_warms_up_in_a_straight_line(name: str) -> None:
    options = {"num_decay_steps": 4} if name == "warmup_stable_decay" else {}
    assert rates(name, **options)[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("name", "options", "update", "expected"),
    [
        ("constant", {}, 0, 1.0),
        ("constant_with_warmup", {}, 11, 1.0),
        ("linear", {}, 10, 0.25),
        ("linear", {}, 12, 0.0),
        ("cosine", {}, 8, 0.5),
        ("cosine", {}, 6, 0.5 * (1 + math.sqrt(0.5))),
        ("cosine_with_restarts", {"num_cycles": 2}, 6, 0.5),
        ("cosine_with_restarts", {"num_cycles": 2}, 8, 1.0),
        ("cosine_with_restarts", {"num_cycles": 2}, 12, 0.0),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 8, 0.6),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 12, 0.2),
        ("polynomial", {"power": 2.0}, 8, 0.25),
        ("polynomial", {"power": 1.0, "lr_end_rate": 0.5}, 8, 0.75),
        ("inverse_sqrt", {}, 16, 0.5),  # (4 / 16) ** 0.5
        ("inverse_sqrt", {"timescale": 12}, 40, 0.5),  # shifted by 8: (12 / 48) ** 0.5
        ("warmup_stable_decay", {"num_decay_steps": 4}, 8, 1.0),
        ("warmup_stable_decay", {"num_decay_steps": 4}, 10, 0.5),
        ("warmup_stable_decay", {"num_decay_steps": 4, "min_lr_rate": 0.1}, 12, 0.1),
    ],
)
def test_values(name: str, options: dict[str, Any], update: int, expected: float) -> None:
    assert SHAPES[name](update, WARMUP, TOTAL, **options) == pytest.approx(expected, abs=1e-12)


# Each schedule's factor on the peak in a run of 25 updates, as papers write it; t counts from the end of warm-up, which
# takes 5 of them.
CURVES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "linear": ({}, lambda t: (20 - t) / 20),
    "cosine": ({}, lambda t: math.cos(math.pi / 2 * t / 20) ** 2),  # (1 + cos 2a) / 2 = cos² a
    "cosine_with_restarts": ({"num_cycles": 4}, lambda t: math.cos(math.pi / 2 * (t % 5) / 5) ** 2),
    "cosine_with_min_lr": ({"min_lr_rate": 0.3}, lambda t: 0.3 + 0.7 * math.cos(math.pi / 2 * t / 20) ** 2),
    "polynomial": ({"power": 3.0, "lr_end_rate": 0.1}, lambda t: 0.1 + 0.9 * (1 - t / 20) ** 3),
    "constant_with_warmup": ({}, lambda t: 1.0),
    "inverse_sqrt": ({}, lambda t: math.sqrt(5 / (5 + t))),
    "warmup_stable_decay": (
        {"num_decay_steps": 8, "min_lr_rate": 0.2},
        lambda t: 1.0 if t < 12 else 0.2 + 0.8 * math.cos(math.pi / 2 * (t - 12) / 8) ** 2,
    ),
}


@pytest.mark.parametrize("name", ["constant", *CURVES])
def test_whole_curves_of_runs(make_fit: MakeFit, name: str) -> None:
    options, curve = CURVES.get(name, ({}, lambda t: 1.0))
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        max_steps=25,
        warmup_steps=0 if name == "constant" else 5,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=options,
        learning_rate=0.02,
        logging_steps=1,
    )
    fit.train()
    warmup = [1.0] * 5 if name == "constant" else [0.0, 0.2, 0.4, 0.6, 0.8]
    expected = [0.02 * factor for factor in [*warmup, *map(curve, range(20))]]
    assert [line["learning_rate"] for line in logs_of(fit)] == pytest.approx(expected, abs=1e-15)


def test_curves_are_of_all_names() -> None:
    # The last one is an update ahead of the others: test_transformers_cases.py holds it beside transformers'.
    assert {*CURVES, "constant", "cosine_warmup_with_min_lr"} == set(SHAPES)


def test_warmup_ratio_is_a_part_of_the_run(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        max_steps=8,
        warmup_ratio=0.5,
        lr_scheduler_type="constant_with_warmup",
        learning_rate=1.0,
        logging_steps=1,
    )
    fit.train()
    assert [line["learning_rate"] for line in logs_of(fit)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])


def test_plateau_steps_on_the_evaluations_metric_only(make_fit: MakeFit) -> None:
    # A learning rate of 1e-12 changes nothing, so every evaluation is a plateau: with patience 0 each but the first
    # divides the rate by ten.
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        regression_rows(4),
        max_steps=6,
        learning_rate=1e-12,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.1, "eps": 0.0},
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
    )
    fit.train()
    rates = [line["learning_rate"] for line in fit.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([1e-12, 1e-12, 1e-12, 1e-12, 1e-13, 1e-13])


def test_plateau_names_the_metrics_there_are(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        regression_rows(4),
        max_steps=2,
        lr_scheduler_type="reduce_lr_on_plateau",
        metric_for_best_model="accuracy",
        eval_strategy="steps",
        eval_steps=1,
    )
    with pytest.raises(ValueError, match=r"asks for 'eval_accuracy', which the evaluation doesn't produce.*eval_loss"):
        fit.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "linear has no option num_cycles; it takes none"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay needs num_decay_steps"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "has no effect with lr_scheduler_type='constant'"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "says the same as warmup_steps=5"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "set eval_strategy"),
        ({"load_best_model_at_end": True}, "needs evaluations to tell which is best"),
        ({"greater_is_better": True}, "has no effect without metric_for_best_model"),
        ({"torch_compile_mode": "max-autotune"}, "has no effect without torch_compile=True"),
        ({"gradient_checkpointing_kwargs": {"a": 1}}, "has no effect without gradient_checkpointing=True"),
        ({"debug": "overflow"}, "must be one of"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitArguments(**arguments)


def test_every_name_is_listed() -> None:
    assert set(SCHEDULERS) == {
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
        "reduce_lr_on_plateau",
        "cosine_warmup_with_min_lr",
        "greedy",
    }


def test_a_step_is_that_of_torchs_own_schedule_to_the_bit() -> None:
    def shape(update: int) -> float:
        return 1 - update / 7.3e3

    def make(kind: type[LambdaLR]) -> LambdaLR:
        weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 0.3}, {"params": [weights[1]], "lr": 0.017}])
        return kind(optimizer, shape)

    ours, theirs = make(Schedule), make(LambdaLR)
    for _ in range(100):
        for schedule in (ours, theirs):
            schedule.optimizer.step()
            schedule.step()
        assert [g["lr"] for g in ours.optimizer.param_groups] == [g["lr"] for g in theirs.optimizer.param_groups]
    assert ours.state_dict() == theirs.state_dict()
