"""What a subclass of Fit, and a TrainModule, may override: each method is called where the page says, one by one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Fit, TrainModule
from stratagem.framework import overriding
from stratagem.framework.data import DataStream
from tiny import Numbers, Regressor, Tagger, collate, parameters_of, regression_rows, token_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

COUNTS = [3, 1, 5, 2]  # labels of the rows below: micro-batches of one row weigh otherwise than rows do


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Makes a Fit of some class, silent and with a directory of its own."""

    def made(kind: type[Fit], module: TrainModule, *data: Any, **arguments: Any) -> Fit:
        quiet: dict[str, Any] = {
            "output_dir": str(tmp_path / "output"), "progress": False, "loggers": (), "save_strategy": "no",
            "shuffle": False, "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0,
            "per_device_train_batch_size": 1, "per_device_eval_batch_size": 3,
        }  # fmt: skip
        return kind(module, *data, **{**quiet, **arguments})

    return made


def rows_by_count() -> list[dict[str, Tensor]]:
    rows = token_rows(6)
    return [rows[count] for count in COUNTS]


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


class Super(Fit):
    """transformers' style, by way of Fit's own method."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss * 5, outputs) if return_outputs else loss * 5


class Forgetful(Fit):
    """By way of Fit's own method, which isn't handed the count."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, **_: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (loss * 5, outputs) if return_outputs else loss * 5


class Mean(Fit):
    """transformers' style without super: a mean, and the labels taken out of the batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels) * 5
        return (loss, outputs) if return_outputs else loss


class Divided(Fit):
    """transformers' style without super: a sum over the items, divided by those of the update."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(inputs["tokens"])
        loss = cross_entropy(outputs, inputs["labels"], reduction="sum") * 5 / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Lone(Fit):
    """A loss alone, whatever is asked for."""

    def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
        return cross_entropy(model(inputs["tokens"]), inputs["labels"]) * 5


class Mapped(Fit):
    """A mapping in the place of a loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(inputs["tokens"])
        loss = cross_entropy(outputs, inputs["labels"])
        found = {"loss": loss * 5, "plain": loss}
        return (found, outputs) if return_outputs else found


class CountTaking(Tagger):
    """Divides by the count of the update itself."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], num_items_in_batch: Any = None) -> Any:
        return cross_entropy(outputs, batch["labels"], reduction="sum") / num_items_in_batch


OVERRIDES = [Super, Forgetful, Mean, Divided, Lone, Mapped]


def tagger(kind: type[TrainModule] = Tagger) -> Any:
    torch.manual_seed(3)
    return kind()


def losses_of_rows(module: Any, rows: list[dict[str, Tensor]]) -> Tensor:
    batch = collate(rows)
    return cross_entropy(module(batch["tokens"]), batch["labels"], reduction="sum") / sum(COUNTS)


# compute_loss.


@pytest.mark.parametrize("module", [Tagger, CountTaking])
@pytest.mark.parametrize("kind", OVERRIDES)
def test_an_overridden_loss_is_one_mean_over_the_update_and_over_an_evaluation(
    kind: type[Fit], module: type[TrainModule], make: Any
) -> None:
    rows, trained = rows_by_count(), tagger(module)
    expected = 5 * losses_of_rows(trained, rows)
    gradients = torch.autograd.grad(expected, list(trained.parameters()))
    before = [parameter.detach().clone() for parameter in trained.parameters()]
    fit = make(kind, trained, rows, rows, gradient_accumulation_steps=4, max_steps=1)
    assert fit.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert fit.train().training_loss == pytest.approx(expected.item(), rel=1e-6)
    for after, first, gradient in zip(trained.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(after.detach(), first - 0.1 * gradient, rtol=1e-5, atol=1e-7)
    assert rows[0].keys() == {"tokens", "labels"}


@pytest.mark.parametrize("kind", [Super, Mean, Divided, Mapped])
def test_predict_and_metrics_have_the_overridden_losss_outputs(kind: type[Fit], make: Any) -> None:
    rows, module = rows_by_count(), tagger()

    def count(predictions: Tensor, labels: Tensor) -> dict[str, float]:
        assert predictions.shape == (4, 6, 7)
        return {"labels": float((labels != -100).sum())}

    fit = make(kind, module, None, rows, compute_metrics=count)
    assert fit.evaluate()["eval_labels"] == sum(COUNTS)
    predicted = fit.predict(rows)
    torch.testing.assert_close(predicted.predictions, module(collate(rows)["tokens"]).detach())
    assert predicted.metrics["test_loss"] == pytest.approx(5 * losses_of_rows(module, rows).item(), rel=1e-6)


def test_outputs_that_are_needed_and_not_returned_are_asked_for_by_name(make: Any) -> None:
    with pytest.raises(TypeError, match=r"Lone\.compute_loss returned a loss alone.*return_outputs=True"):
        make(Lone, tagger()).predict(rows_by_count())


@pytest.mark.parametrize("kind", OVERRIDES)
def test_a_micro_batch_of_padding_alone_changes_nothing(kind: type[Fit], make: Any) -> None:
    rows = [*rows_by_count(), token_rows(1)[0]]  # the last one has no label
    ends = []
    for data in (rows, rows[:4]):
        module = tagger()
        fit = make(kind, module, data, gradient_accumulation_steps=5, max_steps=1)
        if kind is Lone and data is rows:  # without the outputs, there is no way back but through a mean over nothing
            fit.train()
            assert fit.state.skipped_updates in (0, 1)
            return
        fit.train()
        ends.append(parameters_of(module))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


class WithError(Regressor):
    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        error = outputs - batch["y"]
        return {"loss": error.square().mean(), "absolute": error.abs().mean()}


def test_extras_of_a_mapping_loss_come_through_an_override_and_are_not_left_for_the_next(make: Any) -> None:
    rows, module = regression_rows(4), WithError()
    batch = collate(rows)
    absolute = (module(batch["x"]) - batch["y"]).abs().mean().item()
    fit = make(Super, module, rows, rows, max_steps=1, logging_steps=1, gradient_accumulation_steps=4)
    assert fit.evaluate()["eval_absolute"] == pytest.approx(absolute, rel=1e-5)
    fit.train()
    assert fit.state.log_history[0]["absolute"] == pytest.approx(absolute, rel=1e-5)
    own = make(Mapped, tagger(), rows_by_count(), max_steps=1, logging_steps=1)
    own.train()
    assert own.state.log_history[0]["plain"] == pytest.approx(own.state.log_history[0]["loss"] / 5, rel=1e-6)


def test_an_override_computes_in_the_runs_precision(make: Any) -> None:
    seen = []

    class Seeing(Mean):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, **options: Any) -> Any:
            seen.append(model(inputs["tokens"]).dtype)
            return super().compute_loss(model, inputs, return_outputs, **options)

    make(Seeing, tagger(), rows_by_count(), rows_by_count(), precision="bf16-mixed", max_steps=1).train()
    assert seen == [torch.bfloat16]


def test_smoothing_and_a_loss_function_reach_an_override_that_asks_for_them(make: Any) -> None:
    rows, module = rows_by_count(), tagger()
    batch = collate(rows)
    smoothed = cross_entropy(module(batch["tokens"]), batch["labels"], label_smoothing=0.1).item()
    fit = make(Super, module, None, rows, label_smoothing_factor=0.1, per_device_eval_batch_size=4)
    assert fit.evaluate()["eval_loss"] == pytest.approx(5 * smoothed, rel=1e-6)

    def of_mine(outputs: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        return outputs.sum() / num_items_in_batch

    found = make(Super, module, None, rows, compute_loss_func=of_mine).evaluate()["eval_loss"]
    assert found == pytest.approx(5 * module(batch["tokens"]).sum().item() / sum(COUNTS), rel=1e-5)
    for options in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": of_mine}, {"past_index": 1}):
        with pytest.warns(UserWarning, match=f"{next(iter(options))} has no effect: Mean.compute_loss"):
            make(Mean, Remembering(), rows, **options)


class Remembering(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.handed: list[Any] = []

    def forward(self, tokens: Tensor, mems: Any = None) -> Any:
        self.handed.append(mems)
        return {"logits": super().forward(tokens), "mems": tokens.sum()}

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs["logits"], batch)


def test_what_is_handed_on_reaches_an_override_that_asks_for_it(make: Any) -> None:
    rows, module = rows_by_count(), Remembering()
    make(Super, module, rows, past_index=1, max_steps=2).train()
    assert module.handed == [None, rows[0]["tokens"].sum()]


def test_a_loss_that_cant_be_called_is_refused(make: Any) -> None:
    class Short(Fit):
        def compute_loss(self, model: Any, inputs: Any) -> Any: ...  # type: ignore[override]

    with pytest.raises(TypeError, match=r"Write compute_loss\(self, model, inputs, return_outputs=False, num_items"):
        make(Short, tagger(), rows_by_count())


# The other methods of Fit.


def test_training_step(make: Any) -> None:
    class Noting(Fit):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            counts.append((num_items_in_batch, inputs["labels"].ne(-100).sum().item()))
            return super().training_step(model, inputs, num_items_in_batch)

    class Whole(Fit):
        """All of it, as docs/overriding.md writes it."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            count = self.objective.count(inputs)
            inputs = self.strategy.to_device(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            loss = loss * count / num_items_in_batch
            self.strategy.backward(loss)
            return loss.detach()

    counts: list[Any] = []
    ends = []
    for kind in (Fit, Noting, Whole):
        module = tagger()
        made = make(kind, module, rows_by_count(), gradient_accumulation_steps=4, max_steps=1)
        ends.append((made.train().training_loss, *parameters_of(module).values()))
    assert counts == [(sum(COUNTS), count) for count in COUNTS]
    for end in ends[1:]:
        for value, expected in zip(end, ends[0], strict=True):
            torch.testing.assert_close(value, expected)


def test_get_batch_samples(make: Any) -> None:
    class Doubled(Fit):
        def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            asked.append(num_batches)
            return batches[:1], batches[0]["x"].shape[0] if batches else count

    asked: list[int] = []
    fit = make(Doubled, Regressor(), regression_rows(8), gradient_accumulation_steps=2, max_steps=3)
    fit.train()
    assert asked == [2, 2, 2] and fit.state.items_seen == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loaders_may_be_torchs_or_data(workers: int, make: Any) -> None:
    class Loading(Fit):
        def get_train_dataloader(self) -> Any:
            return DataLoader(Numbers(6), batch_size=2, num_workers=workers)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            asked.append(eval_dataset)
            return DataLoader(eval_dataset, batch_size=2)

    class Seeing(TrainModule):
        seen: list[list[float]] = []

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, numbers: Tensor) -> Tensor:
            self.seen.append(numbers.tolist())
            return self.weight * numbers

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.mean()

    asked: list[Any] = []
    held_out = Numbers(3)
    fit = make(Loading, Seeing(), Numbers(1), held_out, max_steps=3, learning_rate=0.0)
    assert isinstance(fit.stream, DataStream)
    fit.train()
    assert fit.module.seen == [[0, 1], [2, 3], [4, 5]]
    assert fit.evaluate()["eval_loss"] == 1.0
    fit.predict(held_out)
    assert asked == [held_out] * 3
    Seeing.seen.clear()


def test_evaluate_predict_log_and_save_checkpoint(make: Any) -> None:
    class Telling(Fit):
        def evaluate(self, *given: Any, **options: Any) -> Any:
            told.append("evaluate")
            return super().evaluate(*given, **options)

        def log(self, logs: dict[str, float]) -> None:
            told.append("log")
            super().log({**logs, "mine": 1.0})

        def save_checkpoint(self) -> Any:
            told.append("save")
            return super().save_checkpoint()

        def predict(self, *given: Any, **options: Any) -> Any:
            told.append("predict")
            return super().predict(*given, **options)

    told: list[str] = []
    rows = regression_rows(4)
    fit = make(
        Telling, Regressor(), rows, rows, max_steps=1, logging_steps=1, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    fit.train()
    fit.predict(rows)
    # Of training, of the evaluation, the run's totals; a prediction without labels has no numbers.
    assert told == ["log", "evaluate", "log", "save", "log", "predict"]
    assert [log["mine"] for log in fit.state.log_history] == [1.0, 1.0, 1.0]


# What isn't called.


@pytest.mark.parametrize("name", ["prediction_step", "create_optimizer", "_prepare_inputs", "save_model"])
def test_a_name_of_transformers_that_isnt_called_is_refused_with_ours(name: str, make: Any) -> None:
    kind = type("Mine", (Fit,), {name: lambda self: None})
    ours = re.escape(overriding.OF_TRANSFORMERS[name])
    with pytest.raises(TypeError, match=rf"Mine\.{name} would never be called.*Here it is {ours}"):
        make(kind, Regressor(), regression_rows(2))


def test_the_inside_of_fit_is_not_for_overriding(make: Any) -> None:
    class Mine(Fit):
        def batches(self, *given: Any) -> Any:
            return super().batches(*given)

    with pytest.warns(UserWarning, match=r"Mine overrides batches of Fit.*overridden: train, training_step"):
        make(Mine, Regressor(), regression_rows(2))


@pytest.mark.parametrize("name", ["training_step", "configure_optimizers", "on_train_epoch_end"])
def test_lightnings_names_on_a_module_are_warned_of_with_ours(name: str, make: Any) -> None:
    kind = type("Mine", (Regressor,), {name: lambda self: None})
    ours = re.escape(overriding.OF_LIGHTNING[name])
    with pytest.warns(UserWarning, match=rf"Mine\.{name} is never called.*{ours}"):
        make(Fit, kind(), regression_rows(2))


def test_every_name_on_the_page_is_there_and_none_of_the_foreign_ones() -> None:
    page = (Path(__file__).parents[2] / "docs" / "overriding.md").read_text()
    for name in overriding.OVERRIDABLE:
        assert callable(getattr(Fit, name)) and f"`{name}" in page, name
    for name in (*overriding.OF_TRANSFORMERS, *overriding.OF_LIGHTNING, *overriding.READ_OF_LIGHTNING):
        assert f"`{name}`" in page, name
    assert not [name for name in overriding.OF_TRANSFORMERS if hasattr(Fit, name)]
    assert not [name for name in overriding.OF_LIGHTNING if hasattr(TrainModule, name)]


# TrainModule.


def test_what_a_module_may_override_is_called(make: Any) -> None:
    called: set[str] = set()

    def telling(name: str) -> Any:
        def method(self: Any, *given: Any, **named: Any) -> Any:
            called.add(name)
            return getattr(super(kind, self), name)(*given, **named)

        if name == "forward":  # the loop reads its signature

            def forward(self: Any, x: Tensor) -> Any:
                return method(self, x)

            return forward

        return method

    names = [
        "forward", "loss", "count_items", "configure_optimizer", "configure_scheduler", "metrics", "flops_per_token",
        "build",
    ]  # fmt: skip
    kind = type("Telling", (Regressor,), {name: telling(name) for name in names})
    rows = regression_rows(4)
    make(Fit, kind(), rows, rows, max_steps=1, eval_on_start=True).train()
    assert called == set(names)
