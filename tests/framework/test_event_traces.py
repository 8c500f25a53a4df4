"""The exact events and flags of two epochs with accumulation 2, in six configurations."""

from pathlib import Path
from typing import Any

import pytest
from stratagem import Callback, Control
from stratagem.framework.callbacks import EVENTS
from tiny import MakeFit, Regressor, regression_rows

LETTERS = {
    "should_log": "L",
    "should_evaluate": "E",
    "should_save": "S",
    "should_epoch_stop": "e",
    "should_training_stop": "t",
}


def raised(control: Control) -> str:
    """A letter for each flag that is up."""
    return "".join(letter for flag, letter in LETTERS.items() if getattr(control, flag))


class Trace(Callback):
    """Notes each event with the updates done and the flags that are up; raises flags itself where it is told to.

    Args:
        raises: "event updates" to the flag to raise there, once, after it is noted.
    """

    def __init__(self, raises: dict[str, str] | None = None) -> None:
        self.raises = dict(raises or {})
        self.heard: list[str] = []


def noting(event: str) -> Any:
    def note(self: Trace, args: Any, state: Any, control: Control, **context: Any) -> None:
        here = f"{event.removeprefix('on_')} {state.global_step}"
        self.heard.append(f"{here} {raised(control)}".rstrip())
        if here in self.raises:
            setattr(control, self.raises.pop(here), True)

    return note


for event in EVENTS:
    setattr(Trace, event, noting(event))


def trace(make_fit: MakeFit, raises: dict[str, str] | None = None, resume: Any = None, **arguments: Any) -> list[str]:
    """Run two epochs of 5 rows in micro-batches of 2: each an update of two and an update of the one that is left."""
    listening = Trace(raises)
    quiet = {"logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no"}
    fit = make_fit(
        Regressor(),
        regression_rows(5),
        regression_rows(2),
        callbacks=[listening],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        **{**quiet, **arguments},
    )
    assert listening.heard.pop(0) == "init_end 0"
    fit.train(resume_from_checkpoint=resume)
    assert raised(fit.control).strip("et") == ""  # what was asked for once is not left for the next run
    return listening.heard


def update(step: int, micro_batches: int, due: str = "") -> list[str]:
    """The events of an update, and the flags that are due at its end."""
    return [
        f"step_begin {step}",
        *[f"substep_end {step}"] * (micro_batches - 1),
        f"pre_optimizer_step {step}",
        f"optimizer_step {step}",
        f"step_end {step + 1} {due}".rstrip(),
    ]


def evaluation(step: int, left: str = "") -> list[str]:
    """One batch, whose results are logged, with the flags that are still up."""
    return [f"{event} {step} {left}".rstrip() for event in ("prediction_step", "log", "evaluate")]


def test_evaluating_and_saving_by_epochs(make_fit: MakeFit) -> None:
    found = trace(make_fit, logging_strategy="steps", logging_steps=2, eval_strategy="epoch", save_strategy="epoch")
    assert found == [
        "train_begin 0",
        "epoch_begin 0",
        *update(0, 2),
        *update(1, 1, "L"),
        "log 2",
        "epoch_end 2 ESe",
        *evaluation(2, "Se"),
        "save 2 e",
        "epoch_begin 2",
        *update(2, 2),
        *update(3, 1, "Lt"),
        "log 4 t",
        "epoch_end 4 ESt",
        *evaluation(4, "St"),
        "save 4 t",
        "log 4 t",
        "train_end 4 t",
    ]


def test_everything_by_updates_and_an_evaluation_at_the_start(make_fit: MakeFit) -> None:
    by_updates = {f"{what}_strategy": "steps" for what in ("logging", "eval", "save")}
    # on_save asks for a log when logs are over: the next update begins without it.
    found = trace(
        make_fit,
        {"save 3": "should_log"},
        logging_steps=2,
        eval_steps=3,
        save_steps=3,
        eval_on_start=True,
        **by_updates,
    )
    assert found == [
        "train_begin 0",
        *evaluation(0),
        "epoch_begin 0",
        *update(0, 2),
        *update(1, 1, "L"),
        "log 2",
        "epoch_end 2 e",
        "epoch_begin 2",
        *update(2, 2, "ES"),
        *evaluation(3, "S"),
        "save 3",
        *update(3, 1, "LESt"),
        "log 4 ESt",
        *evaluation(4, "St"),
        "save 4 t",
        "epoch_end 4 t",
        "log 4 t",
        "train_end 4 t",
    ]


def test_nothing_but_training(make_fit: MakeFit) -> None:
    assert trace(make_fit) == [
        "train_begin 0",
        "epoch_begin 0",
        *update(0, 2),
        *update(1, 1),
        "epoch_end 2 e",
        "epoch_begin 2",
        *update(2, 2),
        *update(3, 1, "t"),
        "epoch_end 4 t",
        "log 4 t",
        "train_end 4 t",
    ]


def test_an_epoch_is_broken_off(make_fit: MakeFit) -> None:
    # The flag is down again when the next epoch begins, which is a whole one.
    assert trace(make_fit, {"step_end 1": "should_epoch_stop", "epoch_end 1": "should_log"}) == [
        "train_begin 0",
        "epoch_begin 0",
        *update(0, 2),
        "epoch_end 1 e",
        "log 1 e",
        "epoch_begin 1",
        *update(1, 2),
        *update(2, 1),
        "epoch_end 3 e",
        "log 3 e",
        "train_end 3 e",
    ]


def test_every_flag_is_obeyed_wherever_it_is_raised(make_fit: MakeFit) -> None:
    raises = {
        "train_begin 0": "should_log",  # too early: an update begins without it
        "step_begin 0": "should_save",
        "substep_end 0": "should_log",
        "log 1": "should_evaluate",
        "evaluate 1": "should_training_stop",
        "epoch_end 1": "should_save",
    }
    assert trace(make_fit, raises) == [
        "train_begin 0",
        "epoch_begin 0 L",
        "step_begin 0",
        "substep_end 0 S",
        "pre_optimizer_step 0 LS",
        "optimizer_step 0 LS",
        "step_end 1 LS",
        "log 1 S",
        *evaluation(1, "S"),
        "save 1 t",
        "epoch_end 1 t",
        "save 1 t",
        "log 1 t",
        "train_end 1 t",
    ]


def test_resumed_in_the_middle_of_an_epoch(make_fit: MakeFit, tmp_path: Path) -> None:
    trace(make_fit, save_strategy="steps", save_steps=1)
    assert trace(make_fit, resume=tmp_path / "output" / "checkpoint-1", logging_strategy="epoch") == [
        "train_begin 1",
        "epoch_begin 1",
        *update(1, 1),
        "epoch_end 2 Le",
        "log 2 e",
        "epoch_begin 2",
        *update(2, 2),
        *update(3, 1, "t"),
        "epoch_end 4 Lt",
        "log 4 t",
        "log 4 t",
        "train_end 4 t",
    ]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_that_was_stopped_is_not_stopped_the_next_time(make_fit: MakeFit, tmp_path: Path, resumes: bool) -> None:
    found = trace(make_fit, {"step_end 1": "should_training_stop"}, save_strategy="steps", save_steps=1)
    assert found[-4:] == ["save 1 t", "epoch_end 1 t", "log 1 t", "train_end 1 t"]
    again = trace(make_fit, resume=resumes, save_strategy="steps", save_steps=10)
    assert again[0] == ("train_begin 1" if resumes else "train_begin 0")
    assert again[-1] == "train_end 4 t"
