"""Averaged weights on one device: their values, what uses them, and a resume, against averages taken by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stratagem import Average, Callback, Fit, TrainModule
from tiny import MakeFit, Regressor, regression_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Trail(Callback):
    """Copies of the weights after each update."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        self.weights.append(copies(fit.module))

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        self.weights.append(copies(fit.module))


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)


def moving(trail: list[dict[str, Tensor]], decays: list[float], every: int = 1) -> dict[str, Tensor]:
    """The average by its definition, in float64."""
    average = {name: weight.double() for name, weight in trail[0].items()}
    for decay, weights in zip(decays, trail[every::every], strict=True):
        average = {name: decay * value + (1 - decay) * weights[name].double() for name, value in average.items()}
    return {name: value.float() for name, value in average.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decay": 0.9, "warm_up": False}, lambda trail: moving(trail, [0.9] * 8)),
        ({"decay": 0.4}, lambda trail: moving(trail, [0.1, 2 / 11, 0.25, 4 / 13, 5 / 14, 0.4, 0.4, 0.4])),
        ({"decay": 0.5, "every": 4, "warm_up": False, "begin": 4}, lambda trail: moving(trail, [0.5, 0.5], 4)),
        (
            {"kind": "swa", "begin": 0.5},
            lambda trail: {k: torch.stack([w[k] for w in trail[4:]]).double().mean(0).float() for k in trail[0]},
        ),
    ],
    ids=["ema", "warm-up", "every fourth", "swa"],
)  # fmt: skip
def test_an_average_is_what_its_definition_says(
    make_fit: MakeFit, tmp_path: Path, options: dict[str, Any], expected: Any
) -> None:
    average, trail = Average(**options), Trail()
    fit = make_fit(Regressor(), regression_rows(32), max_steps=8, callbacks=[average, trail])
    fit.train()
    fit.export(tmp_path / "average.safetensors", weights=average)
    assert_close(load_file(tmp_path / "average.safetensors"), expected(trail.weights))
    assert all(torch.equal(weight, trail.weights[-1][name]) for name, weight in copies(fit.module).items())


class Walked(Regressor):
    """Counts the walks over its parameters."""

    walks = 0

    def named_parameters(self, *given: Any, **options: Any) -> Any:
        self.walks += 1
        return super().named_parameters(*given, **options)


@pytest.mark.parametrize("callbacks", [[], [Average()]], ids=["without", "with"])
def test_no_update_walks_over_the_module(make_fit: MakeFit, callbacks: list[Callback]) -> None:
    def walks(updates: int) -> int:
        fit = make_fit(Walked(), regression_rows(32), max_steps=updates, callbacks=callbacks)
        fit.train()
        return fit.module.walks

    assert walks(9) == walks(2)


def test_evaluate_and_predict_use_it_and_give_the_weights_back(make_fit: MakeFit, tmp_path: Path) -> None:
    average, data = Average(0.8), regression_rows(24)
    fit = make_fit(Regressor(), data, data, max_steps=6, callbacks=[average])
    fit.train()
    before = copies(fit.module)
    losses = fit.evaluate(weights=average)["eval_loss"], fit.evaluate()["eval_loss"]
    predictions = fit.predict(data, weights=average).predictions
    assert all(torch.equal(weight, before[name]) for name, weight in copies(fit.module).items())
    fit.export(tmp_path / "average.safetensors", weights=average)
    other = Regressor()
    other.load_state_dict(load_file(tmp_path / "average.safetensors"))
    x, y = (torch.stack([row[key] for row in data]) for key in ("x", "y"))
    with torch.no_grad():
        outputs = other(x)
    torch.testing.assert_close(predictions, outputs)
    assert losses[0] == pytest.approx(float(nn.functional.mse_loss(outputs, y)), rel=1e-5)
    assert losses[0] != losses[1]


def test_a_resumed_average_is_the_one_that_went_on(make_fit: MakeFit, tmp_path: Path) -> None:
    def run(resume: Any, name: str) -> dict[str, Tensor]:
        average = Average(0.9)
        fit = make_fit(
            Regressor(), regression_rows(40), max_steps=9, save_steps=4, save_strategy="steps", callbacks=[average]
        )
        fit.train(resume_from_checkpoint=resume)
        fit.export(tmp_path / name, weights=average)
        return load_file(tmp_path / name)

    torch.manual_seed(1)
    whole = run(None, "whole")
    resumed = run(tmp_path / "output" / "checkpoint-4", "resumed")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="bf16-true needs torch 2.10")
def test_beside_16_bit_weights_it_is_in_float32(make_fit: MakeFit) -> None:
    average = Average(0.9)
    fit = make_fit(Regressor(), regression_rows(24), max_steps=6, precision="bf16-true", callbacks=[average])
    fit.train()
    weights = average.state_dict()["weights"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


def test_what_is_frozen_has_no_average(make_fit: MakeFit) -> None:
    module = Regressor()
    module.hidden.requires_grad_(False)
    average = Average()
    make_fit(module, regression_rows(8), max_steps=1, callbacks=[average]).train()
    assert sorted(average.state_dict()["weights"]) == ["head.bias", "head.weight"]


def test_the_run_evaluates_it_beside_the_weights(make_fit: MakeFit) -> None:
    data = regression_rows(24)
    average = Average(0.8, evaluate=True)
    fit = make_fit(Regressor(), data, data, max_steps=6, eval_strategy="steps", eval_steps=3, callbacks=[average])
    fit.train()
    names = "eval_loss", "eval_average_loss"
    logged = [(entry["step"], name) for entry in fit.state.log_history for name in names if name in entry]
    assert logged == [(step, name) for step in (3, 6) for name in names]
    last = next(entry[names[1]] for entry in reversed(fit.state.log_history) if names[1] in entry)
    assert last == fit.evaluate(weights=average)["eval_loss"]
    assert "eval_average_loss" not in fit.state.log_history[-1]  # an evaluation of the user's is one


class Normed(Regressor):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(x)))


def test_statistics_of_batch_norm_are_those_of_the_average(make_fit: MakeFit, tmp_path: Path) -> None:
    data = regression_rows(24)
    average = Average(kind="swa", batch_norm_batches=3)
    fit = make_fit(
        Normed(), data, data, max_steps=9, per_device_train_batch_size=8, callbacks=[average], learning_rate=0.3
    )
    fit.train()
    own = fit.module.norm.running_mean.clone()
    fit.export(tmp_path / "average.safetensors", weights=average)
    assert torch.equal(fit.module.norm.running_mean, own)
    found = load_file(tmp_path / "average.safetensors")
    by_hand = Normed()
    by_hand.load_state_dict(found)
    loader = DataLoader([row["x"] for row in data], batch_size=8)
    torch.optim.swa_utils.update_bn(loader, by_hand)
    assert torch.equal(found["norm.running_mean"], by_hand.norm.running_mean)
    assert torch.equal(found["norm.running_var"], by_hand.norm.running_var)
    assert not torch.allclose(found["norm.running_mean"], own)


def test_batches_for_batch_norm_without_such_a_layer_are_refused(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(8), max_steps=1, callbacks=[Average(batch_norm_batches=2)])
    with pytest.raises(ValueError, match=r"batch_norm_batches=2\) has no effect: Regressor has no BatchNorm"):
        fit.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "from 0 to below 1. Received: 1.0"),
        ({"kind": "mean"}, "'ema' or 'swa'. Received: 'mean'"),
        ({"every": 0}, "at least 1. Received: 0"),
        ({"begin": 1.5}, "a share of the run below 1.0. Received: 1.5"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Average(**options)


def test_one_that_was_never_trained_is_refused(make_fit: MakeFit) -> None:
    data = regression_rows(8)
    fit = make_fit(Regressor(), data, data, max_steps=1)
    fit.train()
    with pytest.raises(ValueError, match="This Average has no weights"):
        fit.evaluate(weights=Average())
    with pytest.raises(TypeError, match=r"weights= takes one of the Fit's callbacks.*Received: 'ema'"):
        fit.evaluate(weights="ema")  # type: ignore[arg-type]


def test_a_module_without_training_has_none(make_fit: MakeFit) -> None:
    module: TrainModule = Regressor()
    average = Average()
    fit = make_fit(module, None, regression_rows(8), callbacks=[average])
    with pytest.raises(ValueError, match="This Average has no weights"):
        fit.evaluate(weights=average)
