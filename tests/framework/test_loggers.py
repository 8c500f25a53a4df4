"""Loggers and the progress display: numbers are found where and as they were written."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stratagem import Callback
from stratagem.framework.loggers import Logger, get_loggers
from stratagem.framework.loggers.json_lines import JsonLinesLogger
from stratagem.framework.loggers.tensorboard import TensorBoardLogger
from stratagem.precision import FP16Mixed
from tiny import MakeFit, Regressor, StopAt, Tagger, logs_of, regression_rows, token_rows

RUN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 5,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
}


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def scalars_in(directory: Path) -> dict[str, dict[int, float]]:
    """Everything in the event files of a directory, by TensorBoard's own reader: tag to update to value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        # The epoch comes with every log, and an evaluation's may be that of the training log before it.
        assert tag == "train/epoch" or steps == sorted(set(steps)), f"{tag}: {steps}"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


# JSON lines.


def test_json_lines_hold_what_the_run_logged(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(3), loggers=["jsonl"], **RUN)
    fit.train()
    begin, *rest = lines_of(tmp_path / "output" / "log.jsonl")
    assert begin == {"step": 0, "event": "begin"}
    assert rest == fit.state.log_history
    assert [line["step"] for line in rest] == [2, 4, 4, 5, 5, 5]  # the last are an evaluation at the end and the totals
    assert list(rest[0]) == ["step", "loss", "learning_rate", "epoch"]


def test_json_lines_is_the_default(tmp_path: Path) -> None:
    from stratagem import Fit

    Fit(Regressor(), regression_rows(4), max_steps=1, output_dir=str(tmp_path), progress=False).train()
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")] == [0, 1, 1]


def test_json_lines_go_on_after_a_resume(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {**RUN, "loggers": ["jsonl"], "save_strategy": "steps", "save_steps": 3}
    make_fit(Regressor(), regression_rows(8), regression_rows(3), callbacks=[StopAt(3)], **options).train()
    file = tmp_path / "output" / "log.jsonl"
    before = file.read_text()
    make_fit(Regressor(), regression_rows(8), regression_rows(3), **options).train(resume_from_checkpoint=True)
    assert file.read_text().startswith(before)
    after = lines_of(file)[len(before.splitlines()) :]
    assert after[0] == {"step": 3, "event": "resume"}
    assert [line["step"] for line in after[1:]] == [4, 4, 5, 5, 5]


def test_json_lines_after_a_line_that_a_kill_cut_off(make_fit: MakeFit, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=[JsonLinesLogger(file)]).train()
    first, cut, *rest = file.read_text().splitlines()
    assert (first, cut) == ('{"step": 1, "loss": 0.5}', '{"step": 2, "lo')
    assert [json.loads(line)["step"] for line in rest] == [0, 1, 1]


def test_numbers_that_arent_finite_are_text_in_json(make_fit: MakeFit, tmp_path: Path) -> None:
    make_fit(
        Regressor(),
        regression_rows(4),
        max_steps=1,
        loggers=["jsonl"],
        max_grad_norm=1.0,
        precision=FP16Mixed(initial_scale=2.0**60),
    ).train()
    line = lines_of(tmp_path / "output" / "log.jsonl")[1]
    assert line["grad_norm"] in ("nan", "inf")
    assert line["skipped_updates"] == 1
    # Strict readers take it too: no bare NaN.
    json.loads((tmp_path / "output" / "log.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_json_lines_elsewhere(make_fit: MakeFit, tmp_path: Path) -> None:
    file = tmp_path / "other" / "deep" / "numbers.jsonl"
    make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=[JsonLinesLogger(file)]).train()
    assert [line["step"] for line in lines_of(file)] == [0, 1, 1]
    assert not (tmp_path / "output").exists()


# TensorBoard.


def test_tensorboard_events_are_read_back(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Regressor(), regression_rows(8), regression_rows(3), loggers=["tensorboard"], **RUN)
    fit.train()
    found = scalars_in(tmp_path / "output" / "tensorboard")
    history = fit.state.log_history
    losses = {line["step"]: line["loss"] for line in history if "loss" in line}
    assert list(losses) == [2, 4, 5]
    assert found["train/loss"] == pytest.approx(losses, rel=1e-6)
    assert found["train/learning_rate"] == pytest.approx({2: 0.1, 4: 0.1, 5: 0.1}, rel=1e-6)
    assert found["eval/loss"] == pytest.approx(
        {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}, rel=1e-6
    )
    assert set(found) >= {"train/loss", "train/learning_rate", "train/epoch", "eval/loss"}


def test_tensorboard_hides_what_a_killed_run_wrote_beyond_its_checkpoint(make_fit: MakeFit, tmp_path: Path) -> None:
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "loggers": ["tensorboard"],
        "save_strategy": "steps",
        "save_steps": 3,
    }

    class Dies(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 6:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        make_fit(Regressor(), regression_rows(8), callbacks=[Dies()], **options).train()
    time.sleep(1.1)  # event files are ordered by the second in their names
    fit = make_fit(Regressor(), regression_rows(8), **options)
    fit.train(resume_from_checkpoint=True)
    found = scalars_in(tmp_path / "output" / "tensorboard")["train/loss"]
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found == pytest.approx({line["step"]: line["loss"] for line in logs_of(fit)}, rel=1e-6)


def test_tensorboard_elsewhere_beside_json_lines(make_fit: MakeFit, tmp_path: Path) -> None:
    events = tmp_path / "events"
    make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=["jsonl", TensorBoardLogger(events)]).train()
    assert list(scalars_in(events)["train/loss"]) == [1]
    assert (tmp_path / "output" / "log.jsonl").exists()


# Loggers in general.


class Noting(Logger):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def open(self, fit: Any) -> None:
        self.told.append(("open", fit.state.global_step))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.told.append((sorted(metrics), step))

    def close(self) -> None:
        self.told.append("close")


def test_a_logger_is_opened_told_and_closed(make_fit: MakeFit) -> None:
    logger = Noting()
    fit = make_fit(Regressor(), regression_rows(4), max_steps=1, loggers=[logger])
    assert logger.told == []
    fit.train()
    totals = logger.told.pop(2)
    assert logger.told == [("open", 0), (["epoch", "learning_rate", "loss"], 1), "close"]
    assert {"train_loss", "train_runtime", "epoch"} < {*totals[0]}


def test_a_logger_is_closed_when_training_fails(make_fit: MakeFit) -> None:
    class CantClose(Logger):
        def close(self) -> None:
            raise OSError("the disk is gone")

    logger = Noting()
    with pytest.raises(ValueError, match="forward needs x"):
        make_fit(Regressor(), [{"y": regression_rows(1)[0]["y"]}], max_steps=1, loggers=[CantClose(), logger]).train()
    assert logger.told == [("open", 0), "close"]


def test_unknown_loggers(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match=r"Unknown logger 'tensorbord'\. Did you mean 'tensorboard'"):
        get_loggers(["tensorbord"])
    with pytest.raises(TypeError, match=r"loggers takes a list, e\.g\. loggers=\['jsonl'\]"):
        get_loggers("jsonl")
    with pytest.raises(TypeError, match="logger takes a name or a Logger instance"):
        get_loggers([3])  # type: ignore[list-item]


# Progress.


def test_outside_a_terminal_each_log_is_a_plain_line(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    fit = make_fit(Tagger(), token_rows(8)[1:], token_rows(3), progress=True, **RUN)
    fit.module.item_name = "tokens"
    fit.train()
    lines = capsys.readouterr().out.splitlines()
    history = fit.state.log_history
    assert len(lines) == 6  # three of training, two of evaluations, and the totals
    for line, log in zip(lines, history, strict=True):
        assert line.startswith(f"update {log['step']}/5 | ")
        assert "\x1b" not in line
    assert f"loss {history[0]['loss']:.4g}" in lines[0]
    assert "learning rate 0.1" in lines[0]
    assert re.search(r"[\d,]+ tokens/s", lines[0])
    assert re.search(r"\d+:\d\d left$", lines[0])
    assert f"eval loss {history[2]['eval_loss']:.4g}" in lines[2]


def test_progress_can_be_switched_off(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    make_fit(Regressor(), regression_rows(4), progress=False, max_steps=3).train()
    assert capsys.readouterr().out == ""


PROGRAM = """
import time, torch
from stratagem import Callback, Fit
from tiny import Regressor, regression_rows
class Slow(Callback):
    def on_step_end(self, args, state, control, **context):
        time.sleep(0.05)
        if state.global_step == {fail_at}:
            raise RuntimeError("it failed")
rows = regression_rows(8)
Fit(Regressor(), rows, rows[:2], callbacks=[Slow()], loggers=(), save_strategy="no", output_dir="unused",
    max_steps=12, logging_steps=5, eval_strategy="steps", eval_steps=10).train()
print("and then")
"""


def in_a_terminal(program: str) -> tuple[int, str]:
    """Run a program in a pseudo terminal of 100 columns: (status, what it showed)."""
    controller, terminal = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "LINES": "30",
        "OMP_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=terminal, stderr=terminal, stdin=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    while True:
        ready, _, _ = select.select([controller], [], [], 300)
        assert ready, "nothing was shown for five minutes"
        try:
            part = os.read(controller, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(controller)
    return child.wait(), shown.decode()


def test_in_a_terminal_there_is_a_bar() -> None:
    status, shown = in_a_terminal(PROGRAM.format(fail_at=-1))
    assert status == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "━" in plain
    frames = re.findall(r"update\s+(\d+)/12", plain)
    assert frames[-1] == "12"
    assert len(set(frames)) > 3  # it moved on the way
    assert "loss 0." in plain or "loss 1." in plain
    assert "samples/s" in plain
    assert re.search(r"update 10: eval loss", plain)
    assert "and then" in plain
    assert shown.rindex("\x1b[?25h") > shown.index("\x1b[?25l")  # the cursor is given back


def test_a_failure_in_a_terminal_gives_the_cursor_back_before_the_traceback() -> None:
    status, shown = in_a_terminal(PROGRAM.format(fail_at=6))
    assert status == 1
    assert shown.rindex("\x1b[?25h") < shown.index("Traceback")
    assert "RuntimeError: it failed" in shown
