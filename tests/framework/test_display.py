"""The display of a run: what is said of it, its lines, its bar in a terminal, and where nobody reads any of them."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyte
import pytest
import torch
from stratagem import Callback, EarlyStopping, TrainModule
from stratagem.framework.display.numbers import format_epoch, format_logs, format_value
from stratagem.framework.display.screens import Status
from stratagem.framework.display.terminal import Terminal
from stratagem.strategies import Single
from tiny import MakeFit, Regressor, Tagger, regression_rows, token_rows
from torch import Tensor, nn

RUN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 5,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
}


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def labelled(lines: list[str]) -> dict[str, str]:
    """What stands under each label."""
    return {line[:10].rstrip(): line[11:] for line in lines if not line.startswith("update")}


# What a run is.


def test_a_run_says_what_it_is(make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Regressor()
    module.head.requires_grad_(False)
    fit = make_fit(
        module,
        regression_rows(20),
        progress=True,
        run_name="tiny",
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        save_strategy="steps",
        save_steps=4,
        save_total_limit=2,
        loggers=["jsonl"],
    )
    fit.train()
    lines = lines_of(capsys)
    assert lines[:6] == [
        "run        tiny",
        "module     Regressor: 21 parameters, 16 trainable (76.2 %) and 5 frozen",
        "strategy   single, 32-true, cpu",
        "batch      6 samples in an update = 2 per device x 3 accumulated",
        "length     8 updates, 2 epochs of 20 samples",  # ten micro-batches make four updates
        f"output     {tmp_path / 'output'} (a checkpoint every 4 updates, 2 kept)",
    ]
    said = labelled(lines)
    assert said["saved"] == f"{tmp_path / 'output' / 'checkpoint-4'}"
    assert re.fullmatch(
        r"8 updates in \d+\.\d s \| train loss [\d.]+ \| [\d,]+ samples/s \| [\d.,]+ updates/s "
        r"\| peak memory [\d.]+ GiB",
        said["finished"],
    )
    assert said["results"] == f"{tmp_path / 'output'} (checkpoint-8, log.jsonl, config.yaml)"
    assert "resumed" not in said and "stopped" not in said and "best" not in said


def test_a_resumed_run_says_from_where_and_a_finished_one_that_it_is(
    make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(max_steps: int) -> dict[str, str]:
        options = {"progress": True, "save_strategy": "steps", "save_steps": 2, "max_steps": max_steps}
        make_fit(Regressor(), regression_rows(8), **options).train(resume_from_checkpoint=True)
        return labelled(lines_of(capsys))

    assert "resumed" not in run(4)
    said = run(6)
    assert said["resumed"] == "from checkpoint-4 (update 4 of 6)"
    assert said["finished"].startswith("2 updates in ") and " s, 6 in all | " in said["finished"]
    said = run(6)
    assert said["resumed"] == (
        f"already finished: update 6 of 6, in {tmp_path / 'output' / 'checkpoint-6'}; "
        "a larger max_steps or num_train_epochs goes on"
    )
    assert "finished" not in said and said["results"].endswith("(checkpoint-6, config.yaml)")


def test_early_stopping_says_why_and_the_best_checkpoint_is_named(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**RUN, "max_steps": 20, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "progress": True}
    fit = make_fit(
        Regressor(),
        regression_rows(8),
        regression_rows(3),
        callbacks=[EarlyStopping(patience=2, threshold=100.0)],
        load_best_model_at_end=True,
        **options,
    )
    fit.train()
    said = labelled(lines_of(capsys))
    losses = {log["step"]: log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log}
    assert list(losses) == [2, 4, 6]  # the first is the best by 100, then two without improvement
    why = f"eval_loss hasn't improved by more than 100 in 2 evaluations (best {losses[2]:.4g})"
    assert said["stopped"] == f"early, at update 6 of 20: {why}"
    assert fit.control.stop_reason == why
    best = min(losses, key=lambda step: losses[step])
    assert said["best"] == f"loading checkpoint-{best} (update {best}, eval_loss {losses[best]:#.4g})"


@pytest.mark.parametrize("reason", ["", "enough is enough"])
def test_a_callback_says_why_it_stops_a_run(make_fit: MakeFit, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    class Stop(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 2 and reason:
                control.stop_training(reason)
                control.stop_training("a later reason")
            elif state.global_step == 2:
                control.should_training_stop = True

    fit = make_fit(Regressor(), regression_rows(8), callbacks=[Stop()], max_steps=5, progress=True)
    fit.train()
    said = labelled(lines_of(capsys))["stopped"]
    assert said.startswith("early, at update 2 of 5: ")
    assert said.endswith(reason or "a callback asked for it (control.stop_training says why)")
    fit.pop_callback(Stop)
    fit.train()
    assert "stopped" not in labelled(lines_of(capsys)) and fit.control.stop_reason == ""


def test_checkpoints_that_follow_closely_are_said_once(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    make_fit(Regressor(), regression_rows(8), max_steps=6, save_strategy="steps", save_steps=1, progress=True).train()
    lines = lines_of(capsys)
    assert len([line for line in lines if line.startswith("saved")]) == 1
    assert labelled(lines)["results"].endswith("(checkpoint-6, config.yaml)")


def test_what_other_runs_left_is_no_result_of_this_one(
    make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_fit(Regressor(), regression_rows(8), max_steps=1, save_strategy="steps", loggers=["jsonl"]).train()
    for path in (tmp_path / "output").iterdir():
        os.utime(path, (1e9, 1e9))
    make_fit(Regressor(), regression_rows(8), max_steps=1, progress=True).train()
    assert labelled(lines_of(capsys))["results"] == "none: neither checkpoints nor logs were written"


def test_a_run_that_cant_be_described_goes_on(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Single):
        @property
        def context_parallel_size(self) -> int:  # type: ignore[override]
            raise RuntimeError("no size")

        devices_per_rank = 2

    assert make_fit(Regressor(), regression_rows(8), strategy=Odd(), max_steps=1, progress=True).train()
    assert labelled(lines_of(capsys))["run"] == "it can't be described here (RuntimeError: no size)"


# Lines.


def test_outside_a_terminal_each_log_is_a_plain_line(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    fit = make_fit(Tagger(), token_rows(8)[1:], token_rows(3), progress=True, **RUN)
    fit.module.item_name = "tokens"
    fit.train()
    lines = [line for line in lines_of(capsys) if line.startswith("update")]
    *history, _ = fit.state.log_history
    assert len(lines) == 5  # three of training, two of evaluations; the totals are said in other words
    for line, log in zip(lines, history, strict=True):
        assert line.startswith(f"update {log['step']}/5 | epoch {format_epoch(log['epoch'])} | ")
        assert "\x1b" not in line
    assert f"loss {history[0]['loss']:#.4g} |" in lines[0]
    assert "learning rate 1.00e-01" in lines[0]
    assert re.search(r"[\d,]+ tokens/s", lines[0])
    assert re.search(r"\d+:\d\d left$", lines[0])
    assert f"eval loss {history[2]['eval_loss']:#.4g}" in lines[2]
    assert lines[3].endswith("tokens/s")  # nothing is left of the run


def test_an_evaluation_without_a_run_is_a_line_without_one(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = make_fit(Regressor(), eval_data=regression_rows(4), progress=True).evaluate()["eval_loss"]
    assert lines_of(capsys) == [f"eval loss {loss:#.4g}"]


@pytest.mark.parametrize(
    ("module", "rows", "name"),
    [(Regressor(), regression_rows(8), "samples"), (Tagger(), token_rows(8)[1:], "labels")],
    ids=["one item a sample", "several"],
)
def test_a_rate_is_named_by_what_it_counts(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str], module: TrainModule, rows: list[Any], name: str
) -> None:
    make_fit(module, rows, max_steps=4, logging_steps=2, progress=True).train()
    lines = lines_of(capsys)
    assert re.search(rf" \| [\d,]+ {name}/s", next(line for line in lines if line.startswith("update")))
    assert re.search(rf" \| [\d,]+ {name}/s", labelled(lines)["finished"])


class Causal(nn.Module):
    """A model that computes the loss of shifted labels itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(tokens))
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def test_a_wrapped_language_model_counts_tokens(make_fit: MakeFit, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"tokens": torch.arange(6), "labels": torch.arange(6)}] * 8
    make_fit(TrainModule.wrap(Causal(), causal=True), rows, max_steps=4, logging_steps=2, progress=True).train()
    lines = lines_of(capsys)
    assert lines[0] == "module     Causal: 63 parameters"
    assert [bool(re.search(r"[\d,]+ tokens/s", line)) for line in lines if line.startswith("update")] == [True] * 2
    assert TrainModule.wrap(Causal(), causal=False).item_name == "samples"


def test_numbers_of_one_kind_look_alike() -> None:
    assert [format_epoch(epoch) for epoch in (0.0, 0.0005, 0.25, 1.0, 12.345)] == [
        "0.00", "0.000500", "0.250", "1.00", "12.35",
    ]  # fmt: skip
    assert [format_value("learning_rate", rate) for rate in (2e-05, 0.00802)] == ["2.00e-05", "8.02e-03"]
    assert [format_value("loss", loss) for loss in (2.5, 0.07929, 123.456, 1e-5, 0.0)] == [
        "2.500", "0.07929", "123.5", "1.000e-05", "0.000",
    ]  # fmt: skip
    assert format_value("num_input_tokens_seen", 1234567) == "1,234,567"
    assert format_value("train_memory_cpu_peak", 2**29) == "0.50 GiB"
    assert format_value("loss", float("nan")) == "nan"
    ranks = {"slowest_rank": 1, "slowest_rank_ratio": 1.02, "data_wait_seconds": 0.0006}
    assert format_logs({"loss": 1.0, **ranks}) == {"loss": "1.000"}
    assert format_logs({"loss": 1.0, **ranks, "slowest_rank_ratio": 1.5})["slowest rank"] == "1"


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
Fit(Regressor(), rows, rows[:2], callbacks=[Slow()], loggers=(), save_strategy="no", report=False,
    max_steps=12, logging_steps=5, eval_strategy="steps", eval_steps=10).train()
print("and then")
"""


def python_path() -> str:
    """Where a program of a test finds ``tiny.py``, and the package that is tested."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))


def in_a_terminal(program: str) -> tuple[int, str]:
    """Run a program in a pseudo terminal of 100 columns: (status, what it showed)."""
    controller, terminal = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": python_path(),
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


def screen_of(shown: str, columns: int = 100) -> list[str]:
    """The lines that a terminal ends up with."""
    screen = pyte.Screen(columns, 60)
    pyte.Stream(screen).feed(shown)
    return [line.rstrip() for line in screen.display]


@pytest.mark.slow
def test_in_a_terminal_there_is_a_bar_below_lines_that_stay() -> None:
    status, shown = in_a_terminal(PROGRAM.format(fail_at=-1))
    assert status == 0, shown
    lines = screen_of(shown)
    assert lines[0] == "module     Regressor: 21 parameters"
    logs = [line for line in lines if line.startswith("update") and "|" in line]
    assert [line.split(" | ")[0] for line in logs] == [f"update {n}/12" for n in (5, 10, 10, 12, 12)]
    assert re.fullmatch(
        r"update 5/12 \| epoch 5\.00 \| loss [\d.]+ \| grad norm [\d.]+ \| lr \d\.\d\de-\d\d \| \d+ samples/s", logs[0]
    )
    assert "eval loss" in logs[2] and "eval loss" in logs[4]
    (bar,) = [line for line in lines if "\u2501" in line]
    assert re.fullmatch(
        r"update 12/12 100% \u2501+ epoch 12\.00  loss [\d.]+  (grad norm [\d.]+  )?\d+ samples/s  0:0\d elapsed", bar
    )
    assert lines.index(bar) > lines.index(logs[-1])
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    frames = re.findall(r"update (\d+)/12 +(\d+)% \u2501.*?0:0\d elapsed(  0:0\d left)?", plain)
    assert len(set(frames)) > 3  # it moved on the way
    assert all(int(percent) == round(100 * int(update) / 12) for update, percent, _ in frames)
    assert any(left for _, _, left in frames[1:-1]) and not frames[0][2]
    assert lines[lines.index(bar) + 1].startswith("finished   12 updates in ")
    assert "and then" in lines
    assert shown.rindex("\x1b[?25h") > shown.index("\x1b[?25l")  # the cursor is given back


@pytest.mark.parametrize("columns", [30, 60, 80, 100, 200])
def test_the_bar_takes_one_line_of_any_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    logs = {"loss": "2.253", "grad norm": "0.2186", "learning rate": "2.98e-03"}
    status = Status("", 157, 2000, 0.52, logs, "1,573 tokens/s", 42.0, 2411.0, "checkpoint-100 saved")
    terminal = Terminal()
    with terminal.console.capture() as drawn:
        terminal.console.print(terminal.picture(status))
    (line,) = drawn.get().rstrip("\n").split("\n")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip()
    assert plain.startswith("update 157/2000   8%") and len(plain) <= columns
    assert ("40:11 left" in plain) == (columns >= 60)
    assert ("1,573 tokens/s" in plain) == (columns >= 100)
    assert ("lr 2.98e-03" in plain and "checkpoint-100 saved" in plain) == (columns >= 200)


@pytest.mark.slow
def test_a_failure_in_a_terminal_gives_the_cursor_back_before_the_traceback() -> None:
    status, shown = in_a_terminal(PROGRAM.format(fail_at=6))
    assert status == 1
    assert shown.rindex("\x1b[?25h") < shown.index("Traceback")
    assert "RuntimeError: it failed" in shown


QUIET_PROGRAM = """
import sys, time
from stratagem import Callback, Fit
from tiny import Regressor, regression_rows
class Slow(Callback):
    def on_step_end(self, args, state, control, **context):
        time.sleep(0.05)
rows = regression_rows(8)
fit = Fit(Regressor(), rows, rows[:2], callbacks=[Slow()], loggers=(), save_strategy="no", report=False,
          max_steps=20, logging_steps=1)
print("and then", fit.train().global_step)
print(fit.state.global_step, "updates", file=sys.stderr)
"""


def quiet_program(**streams: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", QUIET_PROGRAM], env=environment, stderr=subprocess.PIPE, text=True, **streams
    )


def check_quiet_end(program: "subprocess.Popen[str]") -> None:
    """It came to its end with status 0, having said once that nobody hears it."""
    errors = program.communicate(timeout=300)[1]
    assert program.returncode == 0, errors
    assert errors.count("OutputWarning: Nothing can be written to <stdout>") == 1
    assert errors.splitlines()[-1] == "20 updates" and "Exception ignored" not in errors


@pytest.mark.slow
def test_a_reader_that_leaves_doesnt_end_the_run() -> None:
    program = quiet_program(stdout=subprocess.PIPE)
    assert program.stdout is not None and program.stdout.readline().startswith("module ")
    program.stdout.close()
    program.stdout = None
    check_quiet_end(program)


@pytest.mark.slow
def test_a_full_disk_behind_the_progress_lines_doesnt_end_the_run() -> None:
    with open("/dev/full", "w") as full:
        check_quiet_end(quiet_program(stdout=full))


@pytest.mark.slow
def test_a_lost_terminal_doesnt_end_the_run() -> None:
    controller, terminal = pty.openpty()
    program = quiet_program(stdout=terminal, stdin=subprocess.DEVNULL, start_new_session=True)
    os.close(terminal)
    assert os.read(controller, 1000)
    os.close(controller)
    check_quiet_end(program)


def test_a_stdout_that_is_closed_or_gone_is_no_reason_to_fail(
    make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = (tmp_path / "closed.txt").open("w")
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        assert make_fit(Regressor(), regression_rows(4), progress=True, max_steps=2, logging_steps=1).train()
