"""Signals that ask a run in one process to end: it is saved, the program's own handlers are called, nothing is left."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stratagem import Callback
from tiny import MakeFit, Regressor, regression_rows

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How the program ended, and how many seconds after the first signal."""

    status: int
    seconds: float
    printed: str


def interrupt(output: Path, *numbers: int, between: float = 0.0, options: tuple[str, ...] = ()) -> Ended:
    """Start the program, and send it signals once it trains."""
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(HERE / "signalled.py"), str(output), *options]
    with (output / "printed").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60.0
        while not (output / "started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        for number in numbers:
            os.killpg(process.pid, number)  # as a terminal does: to workers that load data, too
            time.sleep(between)
        try:
            status = process.wait(timeout=60.0)
        finally:
            process.kill()
    return Ended(status, time.monotonic() - began, (output / "printed").read_text())


def saved(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_ends(tmp_path: Path, number: int, status: int, workers: int) -> None:
    ended = interrupt(tmp_path, number, options=("--workers", str(workers)))
    assert ended.status == status, ended
    assert ended.seconds < 20.0
    (checkpoint,) = saved(tmp_path)
    assert str(checkpoint) in ended.printed and "Traceback" not in ended.printed
    assert "handler after: <Handlers.SIG_DFL" in ended.printed


def test_signals_that_come_together_count_as_one(tmp_path: Path) -> None:
    ended = interrupt(tmp_path, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, options=("--seconds", "0.5"))
    assert ended.status == 143 and len(saved(tmp_path)) == 1, ended


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    options = ("--seconds", "30", "--arguments", "preemption_grace=60")
    ended = interrupt(tmp_path, signal.SIGTERM, signal.SIGTERM, between=2.5, options=options)
    assert ended.status == 143 and not saved(tmp_path), ended
    assert ended.seconds < 10.0
    assert "a second signal, SIGTERM, came" in ended.printed


def test_the_end_of_the_grace_ends_the_process(tmp_path: Path) -> None:
    ended = interrupt(tmp_path, signal.SIGTERM, options=("--seconds", "30", "--arguments", "preemption_grace=2"))
    assert ended.status == 143 and not saved(tmp_path), ended
    assert ended.seconds < 10.0
    assert "preemption_grace=2" in ended.printed


def test_the_programs_own_handler_is_called_and_put_back(tmp_path: Path) -> None:
    ended = interrupt(tmp_path, signal.SIGTERM, options=("--own-handler",))
    assert ended.status == 143 and len(saved(tmp_path)) == 1, ended
    assert "the program's own handler" in ended.printed
    assert "handler after: <function main.<locals>.<lambda>" in ended.printed


def test_another_signal_by_option(tmp_path: Path) -> None:
    options = ("--arguments", "preemption_signals=SIGTERM,SIGUSR1")
    ended = interrupt(tmp_path, signal.SIGUSR1, options=options)
    assert ended.status == 143 and len(saved(tmp_path)) == 1, ended


def test_a_run_in_another_thread_says_that_it_catches_no_signals(tmp_path: Path) -> None:
    ended = interrupt(tmp_path, signal.SIGTERM, options=("--in-thread",))
    assert ended.status == -signal.SIGTERM
    assert "fit.train() runs in thread 'trainer'" in ended.printed


def test_nothing_is_saved_where_nothing_is_to_be(tmp_path: Path) -> None:
    ended = interrupt(tmp_path, signal.SIGTERM, options=("--arguments", "save_strategy=no"))
    assert ended.status == 143 and not saved(tmp_path)
    assert "no checkpoint, as save_strategy='no' asks for" in ended.printed


def test_an_evaluation_that_a_signal_left_out_is_made_once(make_fit: MakeFit, tmp_path: Path) -> None:
    class Signal(Callback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and not (tmp_path / "sent").exists():
                (tmp_path / "sent").touch()
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)  # for the thread that reads it

    options: dict[str, Any] = {
        "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1,
        "per_device_eval_batch_size": 1,
    }  # fmt: skip
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(4), callbacks=[Signal()], **options)
    with pytest.raises(SystemExit):
        fit.train()
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(4), **options)
    fit.train(resume_from_checkpoint=True)
    assert [log["step"] for log in fit.state.log_history if "eval_loss" in log] == [2, 4, 6]
    for update in (3, 6):
        state = json.loads((tmp_path / "output" / f"checkpoint-{update}" / "state.json").read_text())
        assert state["progress"]["evaluation_is_due"] is False
