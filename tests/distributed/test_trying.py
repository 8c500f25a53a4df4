"""Trying things out on real ranks: limits, a few updates, a limit of time, and a sweep of learning rates."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback
from tiny import RowStream
from training import Tagger as Module
from training import curves, make_fit, share_of_16, token_rows

pytestmark = pytest.mark.slow


def limited(streamed: bool = False, **arguments: Any) -> dict[str, list[Any]]:
    """Two epochs of three updates, with the first samples of an evaluation after each."""
    torch.manual_seed(0)
    rows = token_rows(90)
    data = RowStream(rows) if streamed else rows
    fit = make_fit(
        Module(), data, rows[30:], max_steps=-1, num_train_epochs=2.0, limit_train_batches=3, limit_eval_batches=4,
        per_device_eval_batch_size=5, eval_strategy="epoch", **arguments,
    )  # fmt: skip
    fit.train()
    evaluated = [log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log]
    return {**curves(fit), "eval_loss": evaluated}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("world", "strategy", "options"), [(2, "ddp", {}), (2, "fsdp2", {}), (2, "tp", {})], ids=str)
def test_limits_leave_the_same_samples_on_any_ranks(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], streamed: bool
) -> None:
    expected = limited(streamed, per_device_train_batch_size=16)
    assert len(expected["loss"]) == 6 and len(expected["eval_loss"]) == 2
    share = share_of_16(strategy, world, options)
    found = ranks[world].run(
        limited, streamed=streamed, strategy=strategy, options=options, per_device_train_batch_size=share // 2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    for rank in found:
        assert rank["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert rank["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def scheduled(**arguments: Any) -> dict[str, list[Any]]:
    """Updates of 8 samples in the first epoch, and of 24 in the second."""
    torch.manual_seed(0)
    fit = make_fit(
        Module(), token_rows(90), max_steps=-1, num_train_epochs=2.0, gradient_accumulation_schedule={1: 3}, **arguments
    )
    fit.train()
    return curves(fit)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_2"])
def test_updates_change_their_size_on_all_ranks(ranks: dict[int, Ranks], strategy: str) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    expected = scheduled(per_device_train_batch_size=8)
    assert len(expected["loss"]) == 12 + 4
    found = ranks[2].run(scheduled, strategy=strategy, per_device_train_batch_size=4)
    for rank in found:
        assert rank["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert rank["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def overfitted(**arguments: Any) -> dict[str, list[Any]]:
    torch.manual_seed(0)
    fit = make_fit(
        Module(),
        token_rows(90),
        max_steps=-1,
        num_train_epochs=2.0,
        overfit_batches=2,
        eval_strategy="epoch",
        **arguments,
    )
    fit.train()
    return {**curves(fit), "eval_loss": [log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log]}


def test_overfitting_is_the_same_on_ranks(ranks: dict[int, Ranks]) -> None:
    expected = overfitted(per_device_train_batch_size=16)
    assert len(expected["loss"]) == 4
    found = ranks[2].run(overfitted, strategy="ddp", per_device_train_batch_size=4, gradient_accumulation_steps=2)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def tried(directory: str, **arguments: Any) -> tuple[int, int, list[float], str]:
    torch.manual_seed(0)
    rows = token_rows(90)
    fit = make_fit(
        Module(), rows, rows, fast_dev_run=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=9,
        output_dir=directory, **arguments,
    )  # fmt: skip
    fit.train()
    evaluated = [log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log]
    return fit.state.global_step, fit.state.max_steps, evaluated, fit.control.stop_reason


def test_a_few_updates_are_tried_on_ranks(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    directory = tmp_path / "output"
    first, second = ranks[2].run(tried, directory=str(directory), strategy="fsdp2", per_device_train_batch_size=4)
    assert first == second
    assert first[:2] == (2, 20) and len(first[2]) == 1
    assert not directory.exists()


class SlowRank(Callback):
    """The second rank takes its time: the first one, which decides, waits for it."""

    def on_step_begin(self, *context: Any, fit: Any, **_: Any) -> None:
        time.sleep(0.05 if fit.strategy.rank else 0.0)


def timed(directory: str, max_time: float, resume: bool = False, **arguments: Any) -> tuple[int, float, str]:
    torch.manual_seed(0)
    rows = token_rows(90)
    fit = make_fit(
        Module(), rows, rows[:8], max_steps=2000, save_strategy="steps", save_steps=9000, output_dir=directory,
        per_device_train_batch_size=4, max_time=max_time, callbacks=[SlowRank()], **arguments,
    )  # fmt: skip
    began = time.monotonic()
    fit.train(resume_from_checkpoint=resume)
    return fit.state.global_step, time.monotonic() - began, fit.control.stop_reason


@pytest.mark.parametrize("arguments", [{"eval_strategy": "steps", "eval_steps": 5}, {"async_save": True}], ids=str)
def test_all_ranks_end_at_one_update_in_time(
    ranks: dict[int, Ranks], tmp_path: Path, arguments: dict[str, Any]
) -> None:
    ranks[2].run(timed, directory=str(tmp_path / "first"), strategy="ddp", max_time=2.0)  # imports
    directory = str(tmp_path / "output")
    first, second = ranks[2].run(timed, directory=directory, strategy="ddp", max_time=5.0, **arguments)
    assert first[0] == second[0] > 5
    assert max(first[1], second[1]) < 5.0
    assert first[2].startswith("max_time=5.0 is nearly over") and second[2] == ""
    assert (Path(directory) / f"checkpoint-{first[0]}").exists()
    again = ranks[2].run(timed, directory=directory, strategy="ddp", max_time=5.0, resume=True, **arguments)
    assert [step for step, _, _ in again] == [first[0]] * 2


def swept(looks: bool, export: str, **arguments: Any) -> Any:
    """A run, after a sweep of learning rates or without one."""
    torch.manual_seed(0)
    fit = make_fit(Module(), token_rows(90), max_steps=6, per_device_train_batch_size=4, **arguments)
    rates = fit.find_learning_rate(updates=10, max=0.1) if looks else None
    drawn = torch.rand(()).item()
    fit.train()
    fit.export(export)
    return curves(fit), drawn, rates and (rates.rates, rates.losses)


@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [("ddp", {}), ("fsdp2", {"precision": "bf16-mixed"}), ("fsdp2", {"optim": "adamw", "precision": "bf16-true"}),
     ("fsdp1", {}), ("ddp", {"precision": "16-mixed", "gradient_accumulation_steps": 2})],
    ids=str,
)  # fmt: skip
def test_a_sweep_leaves_the_run_as_it_was_on_ranks(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str, arguments: dict[str, Any]
) -> None:
    plain, looked = (
        ranks[2].run(swept, looks=looks, export=str(tmp_path / f"{looks}.safetensors"), strategy=strategy, **arguments)
        for looks in (False, True)
    )
    for before, after in zip(plain, looked, strict=True):
        assert before[:2] == after[:2]
    assert looked[0][2] == looked[1][2] and len(looked[0][2][0]) == 10
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()


def test_a_sweep_leaves_an_engine_as_it_was(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    plain, looked = (
        ranks[2].run(swept, looks=looks, export=str(tmp_path / f"{looks}.safetensors"), strategy="deepspeed_stage_2")
        for looks in (False, True)
    )
    assert plain[0][0] == looked[0][0]
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()
