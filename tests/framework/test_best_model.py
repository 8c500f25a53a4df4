"""The best checkpoint: told by a metric, kept by rotation, loaded at the end; early stopping."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback
from stratagem.framework.builtin_callbacks import EarlyStopping, LearningRateMonitor, Throughput
from tiny import MakeFit, Regressor, Tagger, collate, logs_of, regression_rows, token_rows
from torch import Tensor


class Scripted(Regressor):
    """Its evaluation loss is the next number of a script; its bias counts the updates."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script = iter(script)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        if not self.training:
            return torch.tensor(next(self.script))
        return self.head.bias.sum() * -10.0 + outputs.sum() * 0.0  # SGD at 0.1 adds 1 to the bias


def run(make_fit: MakeFit, script: list[float], **options: Any) -> Any:
    module = Scripted(script)
    with torch.no_grad():
        module.head.bias.zero_()
    defaults: dict[str, Any] = {
        "max_steps": 25,
        "per_device_train_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    fit = make_fit(module, regression_rows(25), regression_rows(1), **{**defaults, **options})
    fit.train()
    return fit


def kept(fit: Any) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in Path(fit.args.output_dir).glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("script", "limit", "best", "expected"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], 2, 25, {20, 25}),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2, 5, {5, 25}),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 1, 25, {25}),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1, 5, {5, 25}),  # the newest whole one always stays
    ],
)
def test_rotation_keeps_the_best(
    script: list[float], limit: int, best: int, expected: set[int], make_fit: MakeFit
) -> None:
    fit = run(make_fit, script, save_total_limit=limit, load_best_model_at_end=True)
    assert fit.state.best_global_step == best
    assert kept(fit) == expected
    assert fit.module.head.bias.item() == pytest.approx(best)


def test_greater_can_be_better(make_fit: MakeFit) -> None:
    fit = run(make_fit, [1.0, 3.0, 2.0, 2.0, 2.0], metric_for_best_model="loss", greater_is_better=True)
    assert (fit.state.best_global_step, fit.state.best_metric) == (10, 3.0)


def test_without_it_the_last_weights_stay(make_fit: MakeFit) -> None:
    fit = run(make_fit, [1.0, 2.0, 3.0, 4.0, 5.0], save_total_limit=2)
    assert kept(fit) == {5, 25}  # the best one's checkpoint stays, for whoever wants it
    assert fit.module.head.bias.item() == pytest.approx(25)


def test_a_metric_that_evaluation_lacks(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"asks for 'eval_f1'.*It produces eval_loss"):
        run(make_fit, [1.0], metric_for_best_model="f1")


def test_early_stopping_counts_evaluations_in_a_row(make_fit: MakeFit) -> None:
    # 3.0 improves, 3.5 and 2.95 don't (the threshold is 0.1), and two in a row are enough.
    fit = run(make_fit, [4.0, 3.0, 3.5, 2.95, 1.0], callbacks=[EarlyStopping(patience=2, threshold=0.1)])
    assert fit.state.global_step == 20


def test_early_stopping_needs_evaluations(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(4), max_steps=1, callbacks=[EarlyStopping()])
    with pytest.raises(ValueError, match="needs evaluations to judge by"):
        fit.train()


def test_two_early_stoppings_are_restored_apart(make_fit: MakeFit) -> None:
    stoppings = [EarlyStopping(patience=9), EarlyStopping(patience=9, threshold=10.0)]
    fit = run(make_fit, [5.0, 4.0, 3.0, 2.0, 1.0], callbacks=stoppings)
    assert [s.without_improvement for s in stoppings] == [0, 4]
    again = [EarlyStopping(patience=9), EarlyStopping(patience=9, threshold=10.0)]
    resumed = make_fit(
        Scripted([]),
        regression_rows(25),
        regression_rows(1),
        max_steps=25,
        per_device_train_batch_size=1,
        eval_strategy="steps",
        eval_steps=5,
        callbacks=again,
    )
    resumed.train(resume_from_checkpoint=f"{fit.args.output_dir}/checkpoint-25")
    assert [(s.best, s.without_improvement) for s in again] == [(1.0, 0), (5.0, 4)]


def test_several_evaluation_sets_and_one_at_the_start(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(4),
        {"near": regression_rows(4), "far": regression_rows(2)},
        max_steps=1,
        eval_on_start=True,
        eval_strategy="no",
    )
    fit.train()
    first = fit.state.log_history[0]
    assert first["step"] == 0
    assert {"eval_near_loss", "eval_far_loss"} <= set(first)


def test_monitors_add_their_numbers(make_fit: MakeFit) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=2,
        callbacks=[LearningRateMonitor(), Throughput()],
    )
    fit.train()
    for line in logs_of(fit):
        assert line["learning_rate_group_0"] == 0.1
        assert line["samples_per_second"] == pytest.approx(2 * line["steps_per_second"])


def test_the_rate_of_every_group_is_logged(make_fit: MakeFit) -> None:
    class TwoRates(Regressor):
        def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
            groups = [{"params": self.hidden.parameters()}, {"params": self.head.parameters(), "lr": 0.5}]
            return torch.optim.SGD(groups, lr=args.learning_rate)

    options = {"max_steps": 4, "lr_scheduler_type": "linear", "logging_steps": 2, "learning_rate": 0.1}
    fit = make_fit(TwoRates(), regression_rows(8), callbacks=[LearningRateMonitor()], **options)
    fit.train()
    # As they stand after the second and the fourth update.
    for group, peak in ((0, 0.1), (1, 0.5)):
        rates = [line[f"learning_rate_group_{group}"] for line in logs_of(fit)]
        assert rates == pytest.approx([peak / 2, 0.0])


def test_throughput_leaves_evaluations_and_checkpoints_out(make_fit: MakeFit) -> None:
    class Slow(Regressor):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            time.sleep(0.02 if self.training else 0.3)
            return super().loss(outputs, batch)

    class SavesSlowly(Callback):
        def on_save(self, *args: Any, **context: Any) -> None:
            time.sleep(0.3)

    fit = make_fit(
        Slow(),
        regression_rows(8),
        regression_rows(2),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=2,
        eval_strategy="steps",
        save_strategy="steps",
        save_steps=2,
        callbacks=[SavesSlowly(), Throughput()],
    )
    fit.train()
    lines = [line for line in fit.state.log_history if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert 7 < line["steps_per_second"] < 50  # at most 50; with either of the others below 7
        assert line["samples_per_second"] == pytest.approx(2 * line["steps_per_second"])


def test_compute_metrics_sees_the_whole_evaluation(make_fit: MakeFit) -> None:
    class Keyed(Tagger):
        def forward(self, tokens: Tensor) -> Any:
            logits = super().forward(tokens)
            return {"logits": logits, "hidden": logits * 0.0}

        def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Any:
            return super().loss(outputs["logits"], batch)

    rows, seen = token_rows(7)[1:], []

    def correct(predictions: Any, labels: Tensor) -> dict[str, float]:
        seen.append(sorted(predictions))
        right = (predictions["logits"].argmax(-1) == labels)[labels != -100]
        return {"correct": right.double().mean().item()}

    module = Keyed()
    fit = make_fit(module, rows, rows, compute_metrics=correct, per_device_eval_batch_size=4)
    metrics = fit.evaluate(ignore_keys=["hidden"])
    batch = collate(rows)
    with torch.no_grad():
        right = (module(batch["tokens"])["logits"].argmax(-1) == batch["labels"])[batch["labels"] != -100]
    assert metrics["eval_correct"] == pytest.approx(right.double().mean().item())
    assert seen == [["logits"]]
