"""The clock of the display: what is left of a run, by hand-made times, and what a run asks of it."""

import time
from typing import Any

import pytest
from stratagem import Callback, FitArguments
from stratagem.framework.display.clock import Clock, evaluations_left
from stratagem.framework.display.progress import Progress
from stratagem.framework.state import TrainState
from tiny import MakeFit, Regressor, regression_rows


def at(step: int, of: int = 100, epoch: float = 0.0) -> TrainState:
    return TrainState(global_step=step, max_steps=of, epoch=epoch)


def test_the_first_update_and_an_evaluation_leave_the_pace_alone() -> None:
    args = FitArguments(max_steps=100, eval_strategy="steps", eval_steps=50)
    clock = Clock(0.0)
    assert clock.seconds_left(60.0, at(1), args) is None  # the first update took a minute
    clock.start(60.0, step=1)
    assert clock.seconds_left(64.0, at(3), args) == pytest.approx(2.0 * 97)
    clock.stop(64.0, step=3)
    clock.start(164.0, step=3, evaluated=True)  # an evaluation of 100 seconds
    assert clock.seconds_per_update(166.0, step=4) == pytest.approx(2.0)
    assert clock.seconds_left(166.0, at(4), args) == pytest.approx(2.0 * 96 + 2 * 100.0)  # at 50, and at 100


def test_other_pauses_are_spread_over_the_updates() -> None:
    args = FitArguments(max_steps=10)
    clock = Clock(0.0)
    clock.start(1.0, step=1)
    clock.stop(5.0, step=5)  # a second each
    clock.start(7.0, step=5)  # a save of two seconds
    assert clock.seconds_left(7.0, at(5, of=10), args) == pytest.approx(5 * (1.0 + 2.0 / 4))


def test_old_stretches_are_forgotten() -> None:
    clock = Clock(0.0)
    now = 0.0
    for step in range(1, 40):  # slow at first, then ten times as fast
        clock.start(now, step)
        now += 1.0 if step < 10 else 0.1
        clock.stop(now, step + 1)
    assert clock.seconds_per_update(now, 40) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "state", "left"),
    [
        ({"eval_strategy": "no"}, at(10), 0),
        ({"eval_strategy": "steps", "eval_steps": 30}, at(0), 4),  # 30, 60, 90, and the end
        ({"eval_strategy": "steps", "eval_steps": 30}, at(30), 3),
        ({"eval_strategy": "steps", "eval_steps": 30}, at(100), 0),
        ({"eval_strategy": "steps", "eval_steps": 30, "eval_delay": 60}, at(10), 3),
        ({"eval_strategy": "epoch"}, at(50, epoch=2.0), 2),
        ({"eval_strategy": "epoch"}, at(100, epoch=4.0), 0),
    ],
)
def test_evaluations_to_come_are_counted(arguments: dict[str, Any], state: TrainState, left: int) -> None:
    assert evaluations_left(state, FitArguments(max_steps=100, **arguments)) == left


class Slow(Callback):
    """Sleeps in updates, longest in the first, and in evaluations."""

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        time.sleep(1.0 if state.global_step == 1 else 0.02)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("logging_steps", [2, 1000], ids=["with logs", "without"])
def test_a_runs_estimate_is_that_of_its_updates(make_fit: MakeFit, logging_steps: int) -> None:
    clocks: list[tuple[float, float]] = []
    display = Progress()

    class Look(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 19:
                pace = display.clock.seconds_per_update(time.monotonic(), 19)
                clocks.append((pace or 0.0, display.clock.evaluating))

    fit = make_fit(
        Regressor(),
        regression_rows(8),
        regression_rows(2),
        callbacks=[Slow(), Look(), display],
        max_steps=20,
        logging_steps=logging_steps,
        eval_strategy="steps",
        eval_steps=8,
    )
    fit.train()
    ((pace, evaluating),) = clocks
    assert 0.02 <= pace < 0.1  # 1.0 / 18 more where the first one counts, 0.5 / 18 for each batch of an evaluation
    assert evaluating >= (1.0 if logging_steps == 2 else 0.0)


def test_between_logs_the_display_hears_of_an_updates_end_alone(make_fit: MakeFit) -> None:
    listening: list[tuple[int, list[str]]] = []
    display = Progress()

    class Look(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
            events = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
            heard = [e for e in events if any(each.__self__ is display for each in fit.callbacks.listeners[e])]
            listening.append((state.global_step, heard))

    make_fit(Regressor(), regression_rows(8), callbacks=[Look(), display], max_steps=8, logging_steps=4).train()
    both = ["on_step_begin", "on_step_end"]
    assert listening == [(1, both), *((n, ["on_step_end"]) for n in (2, 3, 4, 5, 6, 7, 8))]
