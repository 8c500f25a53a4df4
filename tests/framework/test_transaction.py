"""Updates whose gradients aren't finite, or are a spike, are not made; and nothing that isn't finite is saved."""

import copy
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stratagem import Callback, Fit, FitArguments, TrainModule
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.run.spikes import DeviceSpikeRule, SpikeRule
from stratagem.framework.run.transaction import SkippedUpdatesError
from stratagem.precision import FP16Mixed, Precision
from stratagem.strategies import Single
from tiny import Elsewhere, MakeFit, Regressor, collate, logs_of, masters, parameters_of, regression_rows
from torch import Tensor, nn
from torch.optim import Optimizer

BATCH = 4
PRECISIONS = (
    "32-true", "bf16-mixed", pytest.param("bf16-true", marks=masters), "16-mixed",
    pytest.param("16-true", marks=masters), "64-true",
)  # fmt: skip
Rows = list[dict[str, Tensor]]


def poisoned(count: int = 40, *batches: int) -> Rows:
    """Regression rows, of which one in each of these batches (from 0) is NaN."""
    rows = regression_rows(count)
    for batch in batches:
        rows[batch * BATCH + 1] = {**rows[batch * BATCH + 1], "x": torch.full((3,), torch.nan)}
    return rows


class Adaptive(Regressor):
    """Under the optimizer that ``optim`` names."""

    configure_optimizer = TrainModule.configure_optimizer

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        # The backward of torch 2.9's own loss doesn't take two formats.
        return nn.functional.mse_loss(outputs, batch["y"].to(outputs.dtype))


class Momentum(Regressor):
    """Under a fused optimizer that makes its state in its first step."""

    def configure_optimizer(self, args: FitArguments) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate, momentum=0.9, fused=True)


def loop(
    module: TrainModule, rows: Rows, updates: int, left_out: Sequence[int], clip: float, optimizer: Optimizer,
    rates: Sequence[float] | None = None,
) -> list[float]:  # fmt: skip
    """What a run must do, in plain torch: those updates (from 1) are as if their step had never been asked for."""
    losses = []
    per_epoch, made = len(rows) // BATCH, 0
    for update in range(1, updates + 1):
        batch = collate(rows[(update - 1) % per_epoch * BATCH :][:BATCH])
        loss = nn.functional.mse_loss(module(batch["x"]), batch["y"])
        losses.append(loss.item())
        module.zero_grad()
        loss.backward()
        if update in left_out:
            continue
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[made]
        optimizer.step()
        made += 1
    return losses


def assert_same(module: nn.Module, other: nn.Module) -> None:
    for name, tensor in parameters_of(other).items():
        assert torch.equal(module.state_dict()[name], tensor), name


# What is left out.


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("kind", [Regressor, Adaptive, Momentum])
def test_a_run_is_what_it_would_be_without_the_step(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str], kind: type[Regressor], clip: float, elsewhere: bool
) -> None:
    rows, module = poisoned(40, 0, 5), kind()
    mine = copy.deepcopy(module)
    rates = [0.1 * (1 - made / 14) for made in range(14)]
    optimizer = mine.configure_optimizer(FitArguments(learning_rate=0.1))
    expected = loop(mine, rows, 14, (1, 6, 11), clip, optimizer, rates)
    fit = make_fit(
        module, rows, strategy=Elsewhere(device="cpu") if elsewhere else Single(device="cpu"), max_grad_norm=clip,
        per_device_train_batch_size=BATCH, max_steps=14, logging_steps=1, logging_nan_inf_filter=False,
        lr_scheduler_type="linear",
    )  # fmt: skip
    fit.train()
    assert [line["loss"] for line in logs_of(fit)] == pytest.approx(expected, nan_ok=True, rel=1e-6)
    assert_same(module, mine)
    assert fit.state.skipped_updates == 3 and logs_of(fit)[-1]["skipped_updates"] == 3
    assert fit.scheduler.last_epoch == 11  # 14 updates, of which 3 weren't made
    said = [line for line in capsys.readouterr().err.splitlines() if "was not made" in line]
    assert [line.split()[1] for line in said] == ["1", "6", "11"]
    assert "the positions 20 to 23 in the order of epoch 0: 20, 21, 22, 23 of the dataset" in said[1]
    assert "the positions 0 to 3 in the order of epoch 1" in said[2]
    assert "the loss isn't finite" in said[0] and "'head.bias'" in said[0]
    assert ("norm is nan" in said[0]) == bool(clip)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_every_precision_leaves_it_out(make_fit: MakeFit, precision: str, elsewhere: bool) -> None:
    seen: dict[str, Tensor] = {}

    class Before(Callback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
            if state.global_step == 5:
                moments = fit.strategy.optimizer_state()["head.weight"]
                seen.update(parameters_of(fit.module), moment=moments["exp_avg"].clone())

        def on_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
            if state.global_step == 5:
                moments = fit.strategy.optimizer_state()["head.weight"]
                for name, tensor in {**parameters_of(fit.module), "moment": moments["exp_avg"]}.items():
                    assert torch.equal(tensor, seen[name]), name
                seen.clear()
                seen["checked"] = torch.ones(())

    if precision.startswith("16"):
        precision = FP16Mixed(initial_scale=64.0) if precision == "16-mixed" else precision  # type: ignore[assignment]
    fit = make_fit(
        Adaptive(), poisoned(40, 5), precision=precision, callbacks=[Before()], max_grad_norm=1.0, max_steps=9,
        per_device_train_batch_size=BATCH, strategy=Elsewhere(device="cpu") if elsewhere else "single",
    )  # fmt: skip
    fit.train()
    assert "checked" in seen
    assert fit.state.skipped_updates >= 1
    assert all(parameter.isfinite().all() for parameter in fit.module.parameters())


class Hooked(Adaptive):
    """The loss is finite, and one gradient isn't: its second number is, in the 4th update."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.hidden.bias.register_hook(self.spoil)

    def spoil(self, gradient: Tensor) -> Tensor:
        self.updates += 1
        return torch.cat([gradient[:1], gradient[1:2] * torch.inf, gradient[2:]]) if self.updates == 4 else gradient


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_one_number_of_one_gradient_is_found_and_named(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str], clip: float
) -> None:
    fit = make_fit(Hooked(), regression_rows(40), max_steps=8, max_grad_norm=clip)
    fit.train()
    assert fit.state.skipped_updates == 1
    said = capsys.readouterr().err
    assert "Update 4 was not made" in said and "'hidden.bias'." in said and "the loss" not in said


def test_accumulated_micro_batches_are_one_update(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    fit = make_fit(
        Adaptive(), poisoned(40, 3), per_device_train_batch_size=BATCH, gradient_accumulation_steps=2, max_steps=5
    )
    fit.train()
    assert fit.state.skipped_updates == 1
    assert "Update 2 was not made" in (said := capsys.readouterr().err)
    assert "the positions 8 to 15 in the order of epoch 0" in said


def test_more_updates_than_are_said_are_counted(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    make_fit(Adaptive(), poisoned(40, *range(8)), per_device_train_batch_size=BATCH, num_train_epochs=1).train()
    said = capsys.readouterr().err
    assert said.count("was not made") == 5 and "3 more updates since the last log were not made." in said


# The end of a run.


@pytest.mark.parametrize("elsewhere", [False, True])
def test_raise_ends_the_run_at_that_update(make_fit: MakeFit, elsewhere: bool) -> None:
    fit = make_fit(
        Adaptive(), poisoned(40, 3), nonfinite_updates="raise", max_grad_norm=1.0, per_device_train_batch_size=BATCH,
        strategy=Elsewhere(device="cpu") if elsewhere else "single", max_steps=10, logging_steps=1,
    )  # fmt: skip
    with pytest.raises(SkippedUpdatesError, match=r"nonfinite_updates='raise'.* Update 4 was not made"):
        fit.train()
    assert fit.state.global_step == 4
    assert all(parameter.isfinite().all() for parameter in fit.module.parameters())


def test_too_many_in_a_row_end_the_run_and_others_do_not(make_fit: MakeFit) -> None:
    arguments = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "max_skipped_updates": 3}
    make_fit(Adaptive(), poisoned(40, 1, 2, 4, 5, 7, 8), **arguments).train()
    fit = make_fit(Adaptive(), poisoned(40, 1, 2, 4, 5, 6, 8), **arguments)
    with pytest.raises(SkippedUpdatesError) as caught:
        fit.train()
    text = str(caught.value)
    assert "3 updates in a row were not made, up to update 7 (max_skipped_updates=3)" in text
    assert "It began so: Update 5 was not made" in text and "'head.bias'" in text
    assert "the positions 16 to 19 in the order of epoch 0" in text and "debug='underflow_overflow'" in text
    assert fit.state.global_step == 7


def test_a_loss_scale_at_its_floor_ends_the_run(make_fit: MakeFit) -> None:
    fit = make_fit(Adaptive(), poisoned(40, *range(2, 10)), precision=FP16Mixed(initial_scale=8.0), max_steps=40,
                   per_device_train_batch_size=BATCH)  # fmt: skip
    with pytest.raises(SkippedUpdatesError, match=r"fallen to its floor \(loss_scale 0.5\).* Update 3 was not made"):
        fit.train()
    assert fit.state.global_step == 6  # 4, 2, 1, 0.5


def test_an_overflow_by_which_the_scale_is_found_is_counted_alone(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = make_fit(Adaptive(), regression_rows(40), precision=FP16Mixed(initial_scale=2.0**40), max_steps=40)
    fit.train()
    assert fit.state.skipped_updates > 10 and fit.state.skipped_updates < 40
    assert "not made" not in capsys.readouterr().err


# Spikes.


class Scaled(Adaptive):
    """Gradients as large as the batch's factor."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return super().loss(outputs, batch) * batch["factor"].mean()


def factored(count: int, *large: int, factor: float = 1000.0) -> Rows:
    return [
        {**row, "factor": torch.tensor(factor if i in large else 1.0)} for i, row in enumerate(regression_rows(count))
    ]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_spike_is_left_out_after_the_warm_up(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str], elsewhere: bool
) -> None:
    arguments: dict[str, Any] = {
        "strategy": Elsewhere(device="cpu") if elsewhere else "single",
        "max_grad_norm": 1e9, "spike_updates": 8.0, "max_steps": 70, "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
    }  # fmt: skip
    fit = make_fit(Scaled(), factored(80, 65), **arguments)
    fit.train()
    assert fit.state.skipped_updates == 1
    said = capsys.readouterr().err
    assert "Update 66 was not made, as its gradients' norm is" in said and "8 standard deviations" in said
    assert "isn't finite" not in said
    fit = make_fit(Scaled(), factored(80, 30), **arguments)
    fit.train()
    assert fit.state.skipped_updates == 0


norms = st.lists(st.floats(0.0, 1e6, width=32) | st.sampled_from([math.nan, math.inf, 1e9]), max_size=300)


@settings(max_examples=60, deadline=None)
@given(norms, st.floats(0.5, 10.0))
def test_the_rule_is_what_its_documentation_says(values: list[float], threshold: float) -> None:
    rule, device = SpikeRule(threshold), DeviceSpikeRule(threshold, torch.device("cpu"))
    kept: list[float] = []
    mean = variance = 0.0
    for value in values:
        found = rule.refuses(value)
        assert bool(device.flag(torch.tensor(value, dtype=torch.float64)).item()) == found
        if not math.isfinite(value):
            assert not found
            continue
        if len(kept) >= 50 and value > mean + threshold * math.sqrt(variance):
            # Rounding may decide where a norm is exactly at the bound.
            assert found or value == pytest.approx(mean + threshold * math.sqrt(variance))
        elif found:
            assert value == pytest.approx(mean + threshold * math.sqrt(variance))
        if found:
            continue
        kept.append(value)
        if len(kept) <= 100:
            mean, variance = statistics.fmean(kept), statistics.pvariance(kept)
        else:
            mean, variance = 0.99 * mean + 0.01 * value, 0.99 * (variance + 0.01 * (value - mean) ** 2)
        assert rule.mean == pytest.approx(mean, abs=1e-6 * max(kept)) and rule.count == len(kept)
        assert math.sqrt(rule.variance) == pytest.approx(math.sqrt(variance), abs=1e-6 * max(kept), rel=1e-6)
    state = device.state_dict()
    assert state["count"] == rule.count and state["mean"] == pytest.approx(rule.mean)
    again = DeviceSpikeRule(threshold, torch.device("cpu"))
    again.load_state_dict(state)
    assert torch.equal(again.numbers, device.numbers)


# Resuming.


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_counts_on(make_fit: MakeFit, elsewhere: bool) -> None:
    rows = factored(80, 56, 57, 58, 64, 65, 66, 67)
    arguments: dict[str, Any] = {
        "strategy": Elsewhere(device="cpu") if elsewhere else "single", "max_skipped_updates": 4,
        "max_grad_norm": 1e9, "spike_updates": 8.0, "max_steps": 80, "per_device_train_batch_size": 1,
        "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 6, "logging_strategy": "no",
    }  # fmt: skip
    fit = make_fit(Scaled(), rows, **arguments)
    with pytest.raises(SkippedUpdatesError) as caught:
        fit.train()
    saved = Path(fit.args.output_dir)
    assert fit.state.global_step == 68 + elsewhere  # which the host learns an update later
    assert fit.state.skipped_updates == 7
    for update in (60, 66):  # after a row of three, and after the second of the last row
        again = make_fit(Scaled(), rows, **{**arguments, "save_strategy": "no"})
        with pytest.raises(SkippedUpdatesError) as caught_again:
            again.train(resume_from_checkpoint=saved / f"checkpoint-{update}")
        assert str(caught_again.value) == str(caught.value)
        assert "It began so: Update 65 was not made" in str(caught.value)
        assert again.run.transaction.state_dict() == fit.run.transaction.state_dict()
        assert again.state.skipped_updates == 7
        assert_same(again.module, fit.module)


# What is saved.


class Spoiling(Callback):
    """Writes a NaN, as a user's own code may."""

    def __init__(self, at: int, where: str) -> None:
        self.at, self.where = at, where

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        if state.global_step == self.at:
            with torch.no_grad():
                if self.where == "weights":
                    fit.module.hidden.weight[1, 1] = torch.nan  # type: ignore[index, union-attr, operator]
                else:
                    fit.optimizer.state[fit.module.head.weight]["exp_avg"][0, 0] = torch.inf  # type: ignore[union-attr, index]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(("where", "name"), [("weights", "'hidden.weight'"), ("moments", "'head.weight/exp_avg'")])
def test_a_checkpoint_that_is_not_finite_is_not_written(
    make_fit: MakeFit, tmp_path: Path, where: str, name: str, in_background: bool
) -> None:
    fit = make_fit(
        Adaptive(), regression_rows(40), callbacks=[Spoiling(4, where)], save_strategy="steps", save_steps=2,
        save_total_limit=1, max_steps=10, async_save=in_background,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=f"{name} hold numbers that aren't finite"):
        fit.train()
    assert fit.state.global_step == 4
    assert [path.name for path in (tmp_path / "output").glob("checkpoint-*")] == ["checkpoint-2"]
    if where == "weights":
        with pytest.raises(CheckpointError, match=name):
            fit.export(tmp_path / "weights.safetensors")
        assert not (tmp_path / "weights.safetensors").exists()
    again = make_fit(Adaptive(), regression_rows(40), max_steps=10)
    assert again.train(resume_from_checkpoint=tmp_path / "output" / "checkpoint-2").global_step == 10


class Masked(Regressor):
    """Holds infinities on purpose: in a buffer, and in a parameter that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -torch.inf))
        self.bound = nn.Parameter(torch.tensor([-torch.inf, torch.inf]), requires_grad=False)


def test_infinities_in_buffers_and_frozen_parameters_are_saved(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Masked(), regression_rows(40), save_strategy="steps", save_steps=2, max_steps=4)
    fit.train()
    fit.export(tmp_path / "weights.safetensors")
    again = make_fit(Masked(), regression_rows(40), max_steps=6)
    assert again.train(resume_from_checkpoint=True).global_step == 6


# What can't be had is refused, or said.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"nonfinite_updates": "ignore"}, "nonfinite_updates='ignore': must be one of 'skip', 'raise'"),
        ({"spike_updates": 0.0, "max_grad_norm": 1.0}, "spike_updates=0.0: must be above 0"),
        ({"spike_updates": 3.0}, "spike_updates=3.0: goes by the gradients' norm, which max_grad_norm=0.0 leaves out"),
        ({"max_skipped_updates": 0}, "max_skipped_updates=0: must be at least 1"),
        ({"nonfinite_updates": "raise", "optim": "lomo"}, "nonfinite_updates='raise': LOMO and AdaLOMO have updated"),
        ({"nonfinite_updates": "raise", "precision": "16-mixed"}, "by which precision='16-mixed' finds its loss scale"),
    ],
)
def test_what_cannot_work_is_refused(make_fit: MakeFit, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_fit(Adaptive(), regression_rows(8), **arguments)
    assert said in str(caught.value)


def test_an_optimizer_that_updates_in_backward_says_what_it_cannot(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = make_fit(Adaptive(), poisoned(40, 3), optim="lomo", max_steps=10, per_device_train_batch_size=BATCH,
                   save_strategy="steps", save_steps=2, learning_rate=1e-2)  # fmt: skip
    with pytest.raises(CheckpointError, match="hold numbers that aren't finite"):
        fit.train()
    assert "Lomo updates parameters in backward, before all gradients are known" in capsys.readouterr().err
    assert fit.state.global_step == 4


class Searching(Regressor):
    """Under LBFGS, which computes its gradients itself but for the first."""

    def configure_optimizer(self, args: FitArguments) -> Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=args.learning_rate, max_iter=3)


def test_an_optimizer_with_a_closure_leaves_the_update_out(make_fit: MakeFit) -> None:
    fit = make_fit(Searching(), poisoned(40, 3), max_steps=8, per_device_train_batch_size=BATCH)
    fit.train()
    assert fit.state.skipped_updates == 1
    assert all(parameter.isfinite().all() for parameter in fit.module.parameters())


# The flag on the device.


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_flag_leaves_out_the_first_step(fused: bool, momentum: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=momentum, fused=fused)
    precision, other = Precision(), nn.Parameter(torch.ones(3))
    plain = torch.optim.SGD([other], lr=0.1, momentum=momentum, fused=fused)
    for refused in (1.0, 0.0, 1.0, 0.0):
        parameter.grad, other.grad = torch.full((3,), 2.0), torch.full((3,), 2.0)
        precision.step_unless(optimizer, torch.tensor(refused))
        if not refused:
            plain.step()
        assert torch.equal(parameter, other)
    assert not hasattr(optimizer, "found_inf")


class Normed(Adaptive):
    """With statistics that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.hidden(x))))


def test_running_statistics_stay(make_fit: MakeFit) -> None:
    expected = Normed()
    module, elsewhere = copy.deepcopy(expected), copy.deepcopy(expected)
    arguments: dict[str, Any] = {"max_steps": 9, "per_device_train_batch_size": BATCH, "learning_rate": 0.0}
    rows = poisoned(40, 5)
    make_fit(expected, rows[: 5 * BATCH] + rows[6 * BATCH :], **{**arguments, "max_steps": 8}).train()
    make_fit(module, rows, **arguments).train()
    assert_same(module, expected)
    assert int(module.norm.num_batches_tracked) == 8
    # Where the host learns of it an update later, that one's share is lost, too; not where a log comes between.
    make_fit(elsewhere, rows, strategy=Elsewhere(device="cpu"), **arguments).train()
    assert int(elsewhere.norm.num_batches_tracked) == 7 and bool(elsewhere.norm.running_var.isfinite().all())
    logged = copy.deepcopy(Normed())
    logged.load_state_dict(expected.state_dict())
    logged.norm.reset_running_stats()
    make_fit(logged, rows, strategy=Elsewhere(device="cpu"), logging_steps=1, **arguments).train()
    assert_same(logged, expected)
