"""run.json and report.html: what a run writes down of itself, while it goes on, when it ends, and when it can't."""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Callback, Interrupted
from stratagem.framework.checkpoint.line import Line, Marker, read_marker, write_marker
from stratagem.framework.loggers import LoggerWarning
from stratagem.framework.record import facts
from stratagem.framework.record.facts import GitLook, parse_status
from stratagem.framework.record.history import seconds_of
from stratagem.framework.record.run_file import RunFile, read_record
from tiny import MakeFit, Regressor, StopAt, regression_rows

RUN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "max_grad_norm": 1.0,
    "loggers": ["jsonl"],
    "report": True,
}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page as a browser's parser finds it: its elements, its text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.faults: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"{tag} isn't closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.said).append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)


def page_in(directory: Path) -> Page:
    """The report in a directory, whole, small, and asking for nothing from elsewhere."""
    text = (directory / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.faults == []
    assert len(text) < 1_000_000
    outside = [attributes for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert outside == []
    return page


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def record_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def train(make_fit: MakeFit, *callbacks: Callback, resume: Any = None, **options: Any) -> Any:
    rows = regression_rows(16)
    fit = make_fit(Regressor(), rows, rows[:4], callbacks=callbacks, **{**RUN, **options})
    fit.train(resume_from_checkpoint=resume)
    return fit


def test_a_run_is_written_down(make_fit: MakeFit, output: Path) -> None:
    fit = train(make_fit, run_name="seven")
    record = record_in(output)
    assert record["run_name"] == "seven" and record["module"]["class"] == "tiny.Regressor"
    assert (record["module"]["trainable"], record["module"]["frozen"]) == (3 * 4 + 4 + 4 + 1, 0)
    assert record["module"]["children"]["head"] == {"trainable": 5, "frozen": 0}
    assert (record["strategy"]["name"], record["precision"]["name"], record["world_size"]) == ("single", "32-true", 1)
    assert record["versions"]["torch"] == torch.__version__ and record["samples_per_update"] == 2
    assert record["arguments"]["given"] == fit.plan.given.to_dict()
    assert record["arguments"]["settled"]["max_steps"] == 6
    assert {"max_steps", "run_name", "save_total_limit"} <= set(record["arguments"]["not_defaults"])
    assert "report" not in record["arguments"]["not_defaults"]
    assert record["host"]["process"] == os.getpid() and record["device"]["kind"] == "cpu"
    (session,) = record["sessions"]
    assert (session["kind"], session["state"], session["update"], session["last_update"]) == ("begin", "finished", 0, 6)
    assert 0 <= seconds_of(session["ended"]) - seconds_of(session["began"]) < 600  # type: ignore[operator]
    assert record["metrics"]["train_runtime"] == fit.run.results["train_runtime"]
    assert record["evaluation"]["eval_loss"] == fit.state.log_history[-2]["eval_loss"]
    assert record["best"]["update"] == fit.state.best_global_step
    assert record["id_of_run"] == fit.saver.directory.line.id
    there = [each["name"] for each in record["checkpoints"] if not each.get("is_removed")]
    assert there == sorted(path.name for path in output.glob("checkpoint-*"))
    assert [each["update"] for each in record["checkpoints"]] == [2, 4, 6]


def test_the_report_shows_it(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, run_name='<script>alert("x")</script> & more')
    page = page_in(output)
    assert '<script>alert("x")</script> & more' in page.text  # as text, and nothing else
    assert len(page.scripts) == 2
    (data,) = [json.loads(script) for script in page.scripts if script.startswith("[")]
    charts = {chart["title"]: chart["lines"] for chart in data}
    assert {"Loss", "Gradient norm", "Learning rate", "Updates a second", "Memory"} <= set(charts)
    train_line, held_out = charts["Loss"]
    assert train_line["x"] == [1, 2, 3, 4, 5, 6] and held_out["x"] == [2, 4, 6]
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert train_line["y"] == pytest.approx(losses, rel=1e-5)
    # Without a script the same curves are there: one piece of line for each.
    assert sum(tag == "polyline" for tag, _ in page.tags) >= len(charts)
    for said in ("finished", "checkpoint-6", "per_device_train_batch_size", "6 / 6", "Regressor", "(removed)"):
        assert said in page.text


def test_a_run_that_is_resumed_keeps_its_sessions(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, StopAt(4))
    first = record_in(output)
    train(make_fit, resume=True, logging_first_step=True)
    record = record_in(output)
    assert record["id_of_run"] == first["id_of_run"] and "earlier_runs" not in record
    one, two = record["sessions"]
    assert one == first["sessions"][0]
    assert (two["kind"], two["update"], two["state"]) == ("resume", 4, "finished")
    assert two["changed_arguments"] == {"logging_first_step": [False, True]}
    (data,) = [json.loads(script) for script in page_in(output).scripts if script.startswith("[")]
    assert data[0]["lines"][0]["x"] == [1, 2, 3, 4, 5, 6] and data[0]["marks"] == [4]


def test_another_run_in_the_directory_leaves_a_line_of_the_first(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, run_name="first")
    first = record_in(output)
    train(make_fit, run_name="second", max_steps=3)
    record = record_in(output)
    assert record["id_of_run"] != first["id_of_run"] and len(record["sessions"]) == 1
    (earlier,) = record["earlier_runs"]
    assert (earlier["run_name"], earlier["last_update"], earlier["state"]) == ("first", 6, "finished")
    (data,) = [json.loads(script) for script in page_in(output).scripts if script.startswith("[")]
    assert data[0]["lines"][0]["x"] == [1, 2, 3]


class At(Callback):
    def __init__(self, update: int, act: Any) -> None:
        self.update, self.act = update, act

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == self.update:
            self.act()


def fail() -> None:
    raise RuntimeError("<b>no</b> more data")


class StopAt3(Callback):
    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == 3:
            control.stop_training("it is <good> enough")


def test_why_a_run_was_stopped_early_is_written_down(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, StopAt3())
    (session,) = record_in(output)["sessions"]
    assert (session["state"], session["reason"], session["last_update"]) == ("finished", "it is <good> enough", 3)
    assert "it is <good> enough" in page_in(output).text


def test_a_failure_is_written_down(make_fit: MakeFit, output: Path) -> None:
    with pytest.raises(RuntimeError, match="more data"):
        train(make_fit, At(3, fail))
    (session,) = record_in(output)["sessions"]
    assert (session["state"], session["reason"]) == ("failed", "RuntimeError: <b>no</b> more data")
    assert "<b>no</b> more data" in page_in(output).text
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["reason"], last["step"]) == ("fail", session["reason"], 3)


def test_an_interruption_is_written_down(make_fit: MakeFit, output: Path) -> None:
    with pytest.raises(Interrupted):
        train(make_fit, At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    (session,) = record_in(output)["sessions"]
    assert session["state"] == "interrupted" and "checkpoint-" in session["reason"]
    page_in(output)


def test_events_of_checkpoints_are_in_the_log(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, async_save=True)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    told = [(line["event"], line["step"], line.get("checkpoint")) for line in log if "event" in line]
    assert [each for each in told if each[0] == "save"] == [("save", step, f"checkpoint-{step}") for step in (2, 4, 6)]
    left = sorted(path.name for path in output.glob("checkpoint-*"))
    removed = {each[2] for each in told if each[0] == "remove"}
    assert removed == {f"checkpoint-{step}" for step in (2, 4, 6)} - set(left)
    assert told[-1][0] == "finish"
    assert all(abs(seconds_of(line["time"]) - time.time()) < 3600 for line in log)  # type: ignore[operator]


def test_a_fit_with_a_record_is_collected_as_one_without(make_fit: MakeFit, output: Path) -> None:
    fit = train(make_fit, report=True)
    gone = weakref.ref(fit)
    del fit
    gc.collect()
    assert gone() is None


def test_a_program_without_a_file_is_looked_up_where_it_runs(
    make_fit: MakeFit, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.chdir(Path(__file__).parent)
    train(make_fit)
    record = record_in(output)
    assert record["program"]["script"] is None
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode == 0:
        assert record["git"]["commit"] == git.stdout.strip()


def test_it_can_be_switched_off(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, report=False)
    assert not list(output.glob("run.json*")) and not list(output.glob("report*"))


def test_a_full_disk_is_warned_of_once_and_the_run_goes_on(make_fit: MakeFit, output: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = lambda size: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # noqa: E731
    with pytest.warns(LoggerWarning, match=r"The logger Recorder raised in \w+ \(OSError") as warned:
        try:
            fit = train(make_fit, At(3, limit(200)), save_strategy="no", loggers=(), max_steps=8)
        finally:
            limit(hard)()
    assert fit.state.global_step == 8
    assert len([each for each in warned if "raised" in str(each.message)]) == 1
    assert record_in(output)["update"] < 8
    page_in(output)  # the old one is whole
    with pytest.warns(LoggerWarning, match="numbers may be missing"):
        fit.close()
    assert record_in(output)["update"] == 8  # there is room again
    page_in(output)


def test_a_directory_that_is_removed_is_made_again(make_fit: MakeFit, output: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_fit, At(3, lambda: shutil.rmtree(output)), save_strategy="no", loggers=())
    assert record_in(output)["sessions"][0]["state"] == "finished"
    page_in(output)


def test_it_needs_no_log_and_no_checkpoints(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, save_strategy="no", loggers=(), eval_strategy="no", eval_steps=None)
    assert {path.name for path in output.iterdir()} - {"config.yaml"} == {"report.html", "run.json"}
    assert "Loss" in page_in(output).text


def test_a_marker_of_an_earlier_version_is_found_and_kept(make_fit: MakeFit, output: Path) -> None:
    output.mkdir()
    line = Line("ab" * 8, (("cd" * 8, 4),))
    write_marker(output, Marker(line))
    (output / "line.json").rename(output / "run.json")
    assert read_marker(output) == Marker(line)
    file = RunFile(output)
    file.begin("ef" * 8, {"run_name": "x"}, {"kind": "begin"}, {})
    file.write()
    assert read_marker(output) == Marker(line)  # a run that saves nothing leaves it to one that does
    assert read_record(output / "run.json")["run_name"] == "x"
    train(make_fit)
    assert read_marker(output).line.id == record_in(output)["id_of_run"]  # type: ignore[union-attr]


def test_a_record_alone_is_no_marker(make_fit: MakeFit, output: Path) -> None:
    train(make_fit, save_strategy="no")
    assert read_marker(output) is None


# git.


def test_what_git_says_is_read() -> None:
    head = "# branch.oid 1234\n# branch.head main\n"
    assert parse_status(head) == {"commit": "1234", "branch": "main", "is_clean": True, "changed": []}
    found = parse_status(head + "1 .M N... 100644 100644 100644 aa bb a file.py\n2 R. N... 1 1 1 a b R100 x.py\ty.py\n")
    assert found is not None and not found["is_clean"] and found["changed"] == ["a file.py", "R100 x.py"]
    assert parse_status("# branch.oid (initial)\n# branch.head main\n") is None
    assert parse_status("") is None


def test_git_is_asked_and_may_be_missing_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        names = ["-c", "user.name=n", "-c", "user.email=e@e"]
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "trunk")
    (tmp_path / "program.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    found = GitLook(tmp_path).wait(30)
    assert found is not None and found["is_clean"] and found["branch"] == "trunk" and len(found["commit"]) == 40
    (tmp_path / "program.py").write_text("2")
    found = GitLook(tmp_path).wait(30)
    assert found is not None and found["changed"] == ["program.py"]
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "git"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(facts, "GIT_SECONDS", 0.5)
    began = time.monotonic()
    look = GitLook(tmp_path)
    assert look.wait(0.04) is None and time.monotonic() - began < 0.3
    assert look.wait(20) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert GitLook(tmp_path).wait(10) is None


# SIGKILL.


PROGRAM = """
import sys
from stratagem import Fit
from tiny import Regressor, regression_rows
rows = regression_rows(64)
Fit(Regressor(), rows, rows[:4], max_steps=10**6, logging_steps=1, eval_strategy="steps", eval_steps=3, save_steps=7,
    save_total_limit=2, output_dir=sys.argv[1], progress=False).train(resume_from_checkpoint=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_record_and_a_whole_report(tmp_path: Path) -> None:
    places = filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "run"
    for number in range(4):
        child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(output)], env=environment)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            sessions = read_record(output / "run.json").get("sessions", [])
            if len(sessions) > number and sessions[-1]["last_update"] > sessions[-1]["update"] + 14:
                break  # there is a checkpoint to go on from
            assert child.poll() is None
            time.sleep(0.05)
        time.sleep(0.2 + 0.37 * number)
        child.kill()
        child.wait()
        record = record_in(output)
        assert len(record["sessions"]) == number + 1
        assert [each["state"] for each in record["sessions"]] == ["running"] * (number + 1)
        page = page_in(output)
        assert page.text.count("no end was noted") == number
    assert record["sessions"][-1]["update"] > 0
    assert len(list(output.glob("*.partial"))) <= 2  # of the last kill: each run removes what those before have left
