"""Evaluation and prediction: means over items, metrics, and outputs in the data's order."""

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from stratagem import Callback, TrainModule
from stratagem.framework.module import IGNORED_LABEL
from tiny import (
    CLASSES,
    Dropping,
    Float64,
    MakeFit,
    Numbers,
    Regressor,
    RowStream,
    Tagger,
    collate,
    logs_of,
    parameters_of,
    regression_rows,
    token_rows,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader


def mean_over_labels(module: nn.Module, rows: list[Any]) -> float:
    """The cross entropy of every label that counts, one at a time, and their mean."""
    losses = []
    with torch.no_grad():
        for row in rows:
            log_probabilities = module(row["tokens"][None])[0].log_softmax(-1)
            losses += [
                -float(log_probabilities[i, label])
                for i, label in enumerate(row["labels"].tolist())
                if label != IGNORED_LABEL
            ]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_the_loss_is_the_mean_over_all_labels_whatever_the_batches(make_fit: MakeFit, batch_size: int) -> None:
    # Row i has i % 7 labels: batches count differently, at batch size 1 some count none, and the last one is short.
    module, rows = Tagger(), token_rows(18)
    fit = make_fit(module, eval_data=rows, precision=Float64(), per_device_eval_batch_size=batch_size)
    assert fit.evaluate() == {"eval_loss": pytest.approx(mean_over_labels(module, rows), rel=1e-12)}


def test_a_loss_that_names_the_count_is_evaluated_as_a_mean_too(make_fit: MakeFit) -> None:
    class Counted(Tagger):
        def loss(self, outputs: Tensor, batch: Any, num_items_in_batch: Any = None) -> Tensor:
            labels = batch["labels"].flatten()
            return nn.functional.cross_entropy(outputs.flatten(0, 1), labels, reduction="sum") / num_items_in_batch

    module, rows = Counted(), token_rows(10)
    fit = make_fit(module, eval_data=rows, precision=Float64(), per_device_eval_batch_size=3)
    assert fit.evaluate()["eval_loss"] == pytest.approx(mean_over_labels(module, rows), rel=1e-12)


def test_compute_loss_func_is_what_is_evaluated(make_fit: MakeFit) -> None:
    module, rows = Tagger(), token_rows(10)

    def half(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten()) / 2

    fit = make_fit(module, eval_data=rows, precision=Float64(), per_device_eval_batch_size=3, compute_loss_func=half)
    assert fit.evaluate()["eval_loss"] == pytest.approx(mean_over_labels(module, rows) / 2, rel=1e-12)


def test_data_with_no_label_at_all_has_no_loss_and_no_crash(make_fit: MakeFit) -> None:
    rows = [{"tokens": row["tokens"], "labels": torch.full_like(row["labels"], IGNORED_LABEL)} for row in token_rows(3)]
    assert math.isnan(make_fit(Tagger(), eval_data=rows).evaluate()["eval_loss"])


def test_other_data_and_another_prefix(make_fit: MakeFit) -> None:
    module, rows = Tagger(), token_rows(20)
    fit = make_fit(module, eval_data=rows[:7], precision=Float64())
    found = fit.evaluate(rows[7:], metric_key_prefix="final")
    assert found == {"final_loss": pytest.approx(mean_over_labels(module, rows[7:]), rel=1e-12)}


@pytest.mark.parametrize("kind", ["loader", "iterable"])
def test_loaders_and_iterables_are_evaluated_to_their_end(make_fit: MakeFit, kind: str) -> None:
    module, rows = Tagger(), token_rows(11)
    data = DataLoader(rows, batch_size=3, shuffle=True) if kind == "loader" else RowStream(rows)  # type: ignore[arg-type]
    fit = make_fit(module, eval_data=data, precision=Float64(), per_device_eval_batch_size=4)
    for _ in range(2):
        assert fit.evaluate()["eval_loss"] == pytest.approx(mean_over_labels(module, rows), rel=1e-12)


def test_evaluation_changes_nothing(make_fit: MakeFit) -> None:
    # Batch norm's statistics and dropout are off; nothing gets a gradient.
    module = Dropping()
    fit = make_fit(module, eval_data=regression_rows(9), per_device_eval_batch_size=4)
    before = parameters_of(module)
    first, second = fit.evaluate(), fit.evaluate()
    assert first == second
    torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.training


class Classifier(TrainModule):
    """Logits for tuple batches (x, label), with two metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {
            "loss": nn.functional.cross_entropy(outputs, batch[1]),
            "largest": outputs.abs().mean(),
        }

    def metrics(self) -> dict[str, Any]:
        return {
            "accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=4),
            "by_average": torchmetrics.MetricCollection(
                {
                    "macro": torchmetrics.Recall(task="multiclass", num_classes=4, average="macro"),
                    "micro": torchmetrics.Recall(task="multiclass", num_classes=4, average="micro"),
                }
            ),
        }


def classified_rows(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(3, generator=generator), torch.tensor(i % 4)) for i in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_metrics_and_extras_are_those_of_the_whole_data(make_fit: MakeFit, batch_size: int) -> None:
    module, rows = Classifier(), classified_rows(11)
    fit = make_fit(module, eval_data=rows, per_device_eval_batch_size=batch_size)
    logits = torch.stack([module(x) for x, _ in rows]).detach()
    labels = torch.stack([label for _, label in rows])
    right = (logits.argmax(-1) == labels).tolist()
    recalls = []
    for label in sorted(set(labels.tolist())):
        of_label = [hit for hit, actual in zip(right, labels.tolist(), strict=True) if actual == label]
        recalls.append(sum(of_label) / len(of_label))
    expected = {
        "eval_loss": float(-logits.log_softmax(-1).gather(1, labels[:, None]).double().mean()),
        "eval_largest": float(logits.abs().double().mean()),
        "eval_accuracy": sum(right) / 11,
        "eval_by_average_macro": sum(recalls) / len(recalls),
        "eval_by_average_micro": sum(right) / 11,
    }
    for _ in range(2):  # metrics begin anew each time
        assert fit.evaluate() == pytest.approx(expected, rel=1e-6)


def test_a_metric_of_several_numbers_says_what_to_do(make_fit: MakeFit) -> None:
    class PerClass(Classifier):
        def metrics(self) -> dict[str, Any]:
            return {"recall": torchmetrics.Recall(task="multiclass", num_classes=4, average=None)}

    with pytest.raises(ValueError, match=r"'eval_recall' computes a tensor of shape \(4,\).*average='macro'"):
        make_fit(PerClass(), eval_data=classified_rows(4)).evaluate()


def test_metric_inputs_may_be_chosen(make_fit: MakeFit) -> None:
    class Masked(Tagger):
        def metrics(self) -> dict[str, Any]:
            return {"accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES, average="micro")}

        def metric_inputs(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            counts = batch["labels"] != IGNORED_LABEL
            return outputs[counts], batch["labels"][counts]

    module, rows = Masked(), [row for row in token_rows(15) if (row["labels"] != IGNORED_LABEL).any()]
    batch = collate(rows)
    counts = batch["labels"] != IGNORED_LABEL
    hits = (module(batch["tokens"]).argmax(-1) == batch["labels"])[counts]
    found = make_fit(module, eval_data=rows, per_device_eval_batch_size=2).evaluate()
    assert found["eval_accuracy"] == pytest.approx(float(hits.double().mean()), rel=1e-6)


def test_metrics_without_targets_say_what_to_write(make_fit: MakeFit) -> None:
    class NoLabels(Regressor):
        def metrics(self) -> dict[str, Any]:
            return {"error": torchmetrics.MeanSquaredError()}

    with pytest.raises(ValueError, match=r"NoLabels\.metrics\(\) needs.*Write metric_inputs\(self, outputs, batch\)"):
        make_fit(NoLabels(), eval_data=regression_rows(4)).evaluate()


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 6, 8]),
        ({"eval_strategy": "steps", "logging_steps": 4}, [4, 8]),
        ({"eval_strategy": "epoch"}, [4, 8]),
        ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 4, 8]),
        ({}, []),
    ],
)
def test_when_evaluations_happen_in_training(
    make_fit: MakeFit, tmp_path: Path, arguments: dict[str, Any], steps: list[int]
) -> None:
    rows = regression_rows(8)
    fit = make_fit(
        Regressor(),
        rows,
        rows[:3],
        per_device_train_batch_size=2,
        num_train_epochs=2,
        loggers=["jsonl"],
        **arguments,
    )
    fit.train()
    assert [line["step"] for line in fit.state.log_history if "eval_loss" in line] == steps
    lines = [json.loads(line) for line in (tmp_path / "output" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == steps


def test_the_evaluation_in_training_is_that_of_the_current_weights(make_fit: MakeFit) -> None:
    module, rows = Regressor(), regression_rows(8, dtype=torch.float64)
    fit = make_fit(
        module, rows, rows[:3], precision=Float64(), max_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=2
    )
    fit.train()
    batch = collate(rows[:3])
    expected = float((module(batch["x"]) - batch["y"]).detach().square().mean())
    [line] = [line for line in fit.state.log_history if "eval_loss" in line]
    assert line["eval_loss"] == pytest.approx(expected, rel=1e-12)


def test_several_evaluation_sets_by_name(make_fit: MakeFit) -> None:
    module, rows = Tagger(), token_rows(20)
    fit = make_fit(module, eval_data={"near": rows[:9], "far": rows[9:]}, precision=Float64())
    assert fit.evaluate() == {
        "eval_near_loss": pytest.approx(mean_over_labels(module, rows[:9]), rel=1e-12),
        "eval_far_loss": pytest.approx(mean_over_labels(module, rows[9:]), rel=1e-12),
    }


# Prediction.


class Doubler(TrainModule):
    """Doubles numbers, as a mapping of outputs of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, samples: Tensor) -> dict[str, Any]:
        doubled = samples * self.weight
        return {"doubled": doubled, "pair": (doubled, -samples), "loss": doubled.mean(), "name": "batch"}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_predictions_come_in_the_datas_order(make_fit: MakeFit, batch_size: int) -> None:
    result = make_fit(Doubler(), per_device_eval_batch_size=batch_size).predict(Numbers(10))
    numbers = torch.arange(10.0)
    assert torch.equal(result.predictions["doubled"], 2 * numbers)
    assert torch.equal(result.predictions["pair"][0], 2 * numbers)
    assert torch.equal(result.predictions["pair"][1], -numbers.long())
    assert set(result.predictions) == {"doubled", "pair", "name"}
    assert result.metrics == {}


class Named(Doubler):
    """Gives a text for each sample, too."""

    def forward(self, samples: Tensor) -> dict[str, Any]:
        return {"doubled": samples * self.weight, "names": [f"sample {int(each)}" for each in samples]}


def test_a_list_that_has_an_entry_for_each_sample_is_joined(make_fit: MakeFit) -> None:
    result = make_fit(Named(), per_device_eval_batch_size=4).predict(Numbers(10))  # the last batch is short
    assert result.predictions["names"] == [f"sample {number}" for number in range(10)]


def test_keys_may_be_left_out_of_predictions(make_fit: MakeFit) -> None:
    result = make_fit(Doubler()).predict(Numbers(3), ignore_keys=["pair", "name"])
    assert set(result.predictions) == {"doubled"}


class Spied(Tensor):
    """A tensor that writes down when it, or what is computed from it, is copied to the host."""

    events: list[str] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.cpu:
            cls.events.append("to host")
        return super().__torch_function__(function, types, args, kwargs or {})


class FirstToken(TrainModule):
    """Gives the first position of a long sequence, which is a view, and all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.alive: list[int] = []
        self.given: list[Any] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        gc.collect()
        self.alive.append(sum(given() is not None for given in self.given))
        Spied.events.append("forward")
        sequence = x[:, :1] * self.weight * torch.ones(1000)
        self.given.append(weakref.ref(sequence.untyped_storage()))
        return {"first": sequence[:, 0].as_subclass(Spied), "all": sequence}

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return outputs["first"].as_subclass(Tensor).mean()


@pytest.mark.slow
def test_predictions_leave_the_device_batch_by_batch_and_hold_nothing_else(make_fit: MakeFit) -> None:
    seen: list[Any] = []

    def compute_metrics(predictions: Any, labels: Any) -> dict[str, float]:
        seen.append(predictions)
        return {"count": len(labels)}

    rows = [{"x": row["x"], "labels": row["y"]} for row in regression_rows(8)]
    module = FirstToken()
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    fit = make_fit(module, rows[:1], rows, per_device_eval_batch_size=2, compute_metrics=compute_metrics, **options)
    Spied.events = []
    fit.train(ignore_keys_for_eval=["all"])
    assert Spied.events == ["forward", *["forward", "to host"] * 4]  # the first trains
    # While a batch is evaluated, at most the one before is still held by a name; none that was kept.
    assert max(module.alive) <= 1
    assert [set(predictions) for predictions in seen] == [{"first"}]
    assert torch.equal(seen[0]["first"].as_subclass(Tensor), torch.stack([row["x"][0] for row in rows]))
    assert seen[0]["first"].untyped_storage().nbytes() == 8 * 4
    assert logs_of(fit)[-1]["eval_count"] == 8


def test_predictions_carry_no_gradient_and_the_loss_where_there_are_labels(make_fit: MakeFit) -> None:
    module, rows = Tagger(), token_rows(9)
    result = make_fit(module, precision=Float64(), per_device_eval_batch_size=4).predict(rows)
    assert result.predictions.shape == (9, 6, CLASSES)
    assert not result.predictions.requires_grad
    torch.testing.assert_close(result.predictions, module(collate(rows)["tokens"]).detach(), rtol=1e-12, atol=1e-13)
    assert result.metrics == {"test_loss": pytest.approx(mean_over_labels(module, rows), rel=1e-12)}


def test_events_of_evaluation_and_prediction(make_fit: MakeFit) -> None:
    class Heard(Callback):
        def __init__(self) -> None:
            self.events: list[Any] = []

        def on_prediction_step(self, *args: Any, **context: Any) -> None:
            self.events.append("batch")

        def on_evaluate(self, *args: Any, metrics: dict[str, float], **context: Any) -> None:
            self.events.append(set(metrics))

        def on_predict(self, *args: Any, metrics: dict[str, float], **context: Any) -> None:
            self.events.append(set(metrics))

    heard = Heard()
    fit = make_fit(Tagger(), eval_data=token_rows(5), per_device_eval_batch_size=2, callbacks=[heard])
    fit.evaluate()
    assert heard.events == ["batch"] * 3 + [{"eval_loss"}]
    heard.events.clear()
    fit.predict(token_rows(3))
    assert heard.events == ["batch"] * 2 + [{"test_loss"}]


def test_there_must_be_something_to_evaluate(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"nothing to evaluate on: pass eval_data="):
        make_fit(Regressor(), regression_rows(2)).evaluate()


def test_a_failing_evaluation_leaves_the_module_in_training_mode(make_fit: MakeFit) -> None:
    module = Regressor()
    with pytest.raises(ValueError, match="x"):
        make_fit(module, eval_data=[{"y": torch.ones(1)}]).evaluate()
    assert module.training


class Ragged(TrainModule):
    """Gives rows in a mapping, in a tuple in it, as texts, and some whose length changes from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.batches = 0

    def forward(self, x: Tensor) -> Any:
        self.batches += 1
        ragged = x[:, :1].expand(-1, 1 + self.batches % 3) * self.weight
        return {"x": x * 2, "pair": (x[:, 0], x[:, :0]), "text": [str(len(x))] * len(x), "ragged": ragged}


@pytest.mark.parametrize("known", [True, False])
def test_outputs_of_any_shape_are_joined_and_alike_ones_without_a_copy(
    make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    rows = regression_rows(10)
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *args, **kwargs: joined.append(len(parts)) or cat(parts, *args))
    data = rows if known else RowStream(rows)
    found = make_fit(Ragged(), per_device_eval_batch_size=4).predict(data).predictions
    x = torch.stack([row["x"] for row in rows])
    assert torch.equal(found["x"], x * 2) and torch.equal(found["pair"][0], x[:, 0])
    assert found["pair"][1].shape == (10, 0) and found["text"] == ["4"] * 8 + ["2"] * 2
    lengths = [2] * 4 + [3] * 4 + [1] * 2
    for row, length, sample in zip(found["ragged"], lengths, x, strict=True):
        assert row.tolist() == [float(sample[0])] * length + [-100.0] * (3 - length)
    if known:
        assert found["x"].untyped_storage().nbytes() == found["x"].nbytes  # made once, for all rows
        assert len(joined) == 1  # the ragged ones
    else:
        assert len(joined) == 4
