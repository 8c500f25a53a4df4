"""Callbacks: who hears what, what flags do, and whose state is whose. The exact events are in test_event_traces.py."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Control, FitArguments, TrainState
from stratagem.framework.callbacks import EVENTS, Callbacks
from stratagem.framework.foreign_events import HOOKS
from tiny import Float64, MakeFit, Regressor, StopAt, collate, lines_of, logs_of, parameters_of, regression_rows


def spy(events: list[str], name: str = "") -> Callback:
    """A callback that notes every event it hears, with the update it heard it in."""

    def note(event: str) -> Any:
        def method(self: Callback, args: Any, state: Any, control: Any, **context: Any) -> None:
            assert isinstance(args, FitArguments)
            assert isinstance(state, TrainState)
            assert isinstance(control, Control)
            assert context["fit"].state is state
            events.append(f"{name}{event.removeprefix('on_')} {state.global_step}")

        return method

    return type("Spy", (Callback,), {event: note(event) for event in EVENTS})()


def test_callbacks_hear_events_in_their_order(make_fit: MakeFit) -> None:
    heard: list[str] = []
    callbacks = [spy(heard, "first "), spy(heard, "second ")]
    make_fit(Regressor(), regression_rows(2), callbacks=callbacks, max_steps=1).train()
    assert heard[::2] == [event.replace("second", "first") for event in heard[1::2]]
    assert all(event.startswith("first") for event in heard[::2])


def test_an_exception_is_announced_and_raised(make_fit: MakeFit) -> None:
    class Failing(Callback):
        def __init__(self) -> None:
            self.seen: list[BaseException] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("the second update")

        def on_exception(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            self.seen.append(context["exception"])
            raise ValueError("this one must not hide the first")

        def on_train_end(self, *args: Any, **context: Any) -> None:
            raise AssertionError("training did not end, it failed")

    callback = Failing()
    with pytest.raises(RuntimeError, match="the second update") as caught:
        make_fit(Regressor(), regression_rows(4), callbacks=[callback], max_steps=5).train()
    assert callback.seen == [caught.value]


def test_an_interrupt_is_an_exception_too(make_fit: MakeFit) -> None:
    class Interrupting(Callback):
        seen: list[str] = []

        def on_step_begin(self, *args: Any, **context: Any) -> None:
            raise KeyboardInterrupt

        def on_exception(self, *args: Any, exception: BaseException, **context: Any) -> None:
            self.seen.append(type(exception).__name__)

    with pytest.raises(KeyboardInterrupt):
        make_fit(Regressor(), regression_rows(4), callbacks=[Interrupting()], max_steps=5).train()
    assert Interrupting.seen == ["KeyboardInterrupt"]


def test_only_overridden_methods_listen() -> None:
    class One(Callback):
        def on_log(self, *args: Any, **context: Any) -> None:
            pass

    class Inherits(One):
        pass

    one, inherits, none = One(), Inherits(), Callback()
    callbacks = Callbacks([one, none, inherits])
    listeners = {event: methods for event, methods in callbacks.listeners.items() if methods}
    assert listeners == {"on_log": [one.on_log, inherits.on_log]}
    assert set(callbacks.listeners) == set(EVENTS)
    assert {name for name in vars(Callback) if name.startswith("on_")} == set(EVENTS)


def test_callbacks_are_instances() -> None:
    with pytest.raises(TypeError, match=r"instances of stratagem\.Callback.*Received: <class"):
        Callbacks([StopAt])  # type: ignore[list-item]


# Flags.


class Asks(Callback):
    """Raises a flag at the end of some updates."""

    def __init__(self, flag: str, *steps: int) -> None:
        self.flag = flag
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step in self.steps:
            setattr(control, self.flag, True)


OFF = {"logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no"}


def test_a_flag_asks_for_a_log(make_fit: MakeFit) -> None:
    fit = make_fit(Regressor(), regression_rows(4), callbacks=[Asks("should_log", 2, 5)], max_steps=6, **OFF)
    fit.train()
    assert [line["step"] for line in logs_of(fit)] == [2, 5]
    assert not fit.control.should_log


def test_a_flag_asks_for_an_evaluation_and_for_a_checkpoint(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(
        Regressor(),
        regression_rows(4),
        regression_rows(2),
        callbacks=[Asks("should_evaluate", 3), Asks("should_save", 1, 4)],
        max_steps=5,
        **OFF,
    )
    fit.train()
    assert [line["step"] for line in fit.state.log_history if "eval_loss" in line] == [3]
    assert sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]


def test_a_flag_ends_an_epoch(make_fit: MakeFit) -> None:
    heard: list[str] = []
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        callbacks=[Asks("should_epoch_stop", 2), spy(heard)],
        per_device_train_batch_size=2,
        num_train_epochs=2,
    )
    # The first epoch ends after two updates; eight were planned, and the second has only its own four.
    assert fit.train().global_step == 6
    ends = [event for event in heard if event.startswith("epoch")]
    assert ends == ["epoch_begin 0", "epoch_end 2", "epoch_begin 2", "epoch_end 6"]


def test_a_flag_ends_training(make_fit: MakeFit) -> None:
    heard: list[str] = []
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        callbacks=[Asks("should_training_stop", 3), spy(heard)],
        per_device_train_batch_size=2,
        num_train_epochs=2,
    )
    assert fit.train().global_step == 3
    assert heard[-3:] == ["epoch_end 3", "log 3", "train_end 3"]


def test_a_callback_may_take_a_flag_back(make_fit: MakeFit, tmp_path: Path) -> None:
    class NotNow(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            control.should_save = state.global_step == 4 and control.should_save

    make_fit(
        Regressor(), regression_rows(4), callbacks=[NotNow()], max_steps=4, save_strategy="steps", save_steps=2
    ).train()
    assert [path.name for path in (tmp_path / "output").glob("checkpoint-*")] == ["checkpoint-4"]


def test_what_is_logged_may_be_changed(make_fit: MakeFit, tmp_path: Path) -> None:
    class Adds(Callback):
        def on_log(self, *args: Any, logs: dict[str, float], **context: Any) -> None:
            logs["perplexity"] = 7.5
            logs.pop("learning_rate", None)

    fit = make_fit(Regressor(), regression_rows(4), callbacks=[Adds()], max_steps=1, loggers=["jsonl"])
    fit.train()
    assert fit.state.log_history[0]["perplexity"] == 7.5
    line = lines_of(tmp_path / "output" / "log.jsonl")[1]
    assert set(line) == {"step", "loss", "perplexity", "epoch"}


def test_gradients_stand_ready_before_and_after_the_optimizer_steps(make_fit: MakeFit) -> None:
    rows = regression_rows(4, dtype=torch.float64)
    module = Regressor().double()
    batch = collate(rows)
    loss = (module(batch["x"]) - batch["y"]).square().mean()
    expected = dict(
        zip(dict(module.named_parameters()), torch.autograd.grad(loss, list(module.parameters())), strict=True)
    )
    before = parameters_of(module)

    class Looks(Callback):
        checked = 0

        def on_pre_optimizer_step(self, *args: Any, **context: Any) -> None:
            torch.testing.assert_close(parameters_of(module), before, rtol=0, atol=0)
            self.check()

        def on_optimizer_step(self, *args: Any, **context: Any) -> None:
            assert not torch.equal(module.head.weight, before["head.weight"])
            self.check()

        def check(self) -> None:
            self.checked += 1
            gradients = {name: p.grad for name, p in module.named_parameters()}
            torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-14)

    looks = Looks()
    make_fit(
        module,
        rows,
        callbacks=[looks],
        precision=Float64(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    ).train()
    assert looks.checked == 2


# State.


class Counts(Callback):
    """Counts updates, in steps of its own; the count is its state."""

    def __init__(self, by: int) -> None:
        self.by = by
        self.count = 0

    def on_step_end(self, *args: Any, **context: Any) -> None:
        self.count += self.by

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class CountsToo(Counts):
    """Another class, between the two of one class."""


def test_the_states_of_two_callbacks_of_one_class_are_kept_apart(make_fit: MakeFit) -> None:
    rows = regression_rows(4)
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    make_fit(Regressor(), rows, callbacks=[Counts(1), CountsToo(100), Counts(10), StopAt(3)], **options).train()
    resumed = [Counts(1), CountsToo(100), Counts(10)]
    make_fit(Regressor(), rows, callbacks=resumed, **options).train(resume_from_checkpoint=True)
    assert [callback.count for callback in resumed] == [6, 600, 60]


def test_a_callback_that_is_new_or_gone_on_resuming_is_no_error(make_fit: MakeFit) -> None:
    rows = regression_rows(4)
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    make_fit(Regressor(), rows, callbacks=[Counts(1), StopAt(3)], **options).train()
    fresh = CountsToo(100)
    make_fit(Regressor(), rows, callbacks=[fresh], **options).train(resume_from_checkpoint=True)
    assert fresh.count == 300


# Names of other trainers.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("on_train_start", "Mine.on_train_start is never called: that is Lightning's name. Here it is on_train_begin."),
        ("on_train_batch_end", "that is Lightning's name. Here it is on_step_end"),
        ("on_validation_epoch_end", "that is Lightning's name. Here it is on_evaluate."),
        ("batch_end", "that is Composer's name. Here it is on_step_end"),
        ("fit_start", "that is Composer's name. Here it is on_train_begin."),
        ("on_batch_begin", "that is Keras's name. Here it is on_step_begin."),
        ("on_test_batch_end", "that is Lightning's and Keras's name. Here it is on_prediction_step."),
        ("on_evaluat", "no event has that name. Did you mean on_evaluate?"),
    ],
)
def test_a_hook_that_isnt_called_is_warned_of_with_ours(make_fit: MakeFit, name: str, expected: str) -> None:
    callback = type("Mine", (Callback,), {name: lambda self, *given: None})()
    with pytest.warns(UserWarning) as caught:
        make_fit(Regressor(), regression_rows(2), callbacks=[callback])
    assert [expected in str(each.message) for each in caught] == [True]
    fit = make_fit(Regressor(), regression_rows(2))
    with pytest.warns(UserWarning, match=f"Mine.{name} is never called"):
        fit.add_callback(callback)


def test_an_event_of_another_trainers_signature_is_refused_with_ours(make_fit: MakeFit) -> None:
    class Keras(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # type: ignore[override]
            pass

    class Lightning(Callback):
        def on_evaluate(self, trainer: Any, module: Any, *, metrics: Any) -> None:  # type: ignore[override]
            pass

    with pytest.raises(TypeError, match=r"Keras\.on_epoch_end is called as on_epoch_end\(args, state, control, fit="):
        make_fit(Regressor(), regression_rows(2), callbacks=[Keras()])
    with pytest.raises(TypeError, match=r"Write on_evaluate\(self, args, state, control, \*, metrics, \*\*context\)"):
        make_fit(Regressor(), regression_rows(2), callbacks=[Lightning()])


def test_every_foreign_hook_is_foreign() -> None:
    assert not [name for name in HOOKS if hasattr(Callback, name)]
    ours = {event for _, (_, text) in HOOKS.items() for event in re.findall(r"\bon_\w+", text)}
    assert ours <= set(EVENTS)
