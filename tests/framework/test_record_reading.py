"""Reading what runs have written: logs that grow, are cut off, damaged or replaced; what is shown of them."""

import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from stratagem.framework.command_line import main
from stratagem.framework.record.curves import Curve, thin
from stratagem.framework.record.finding import Run, runs_in
from stratagem.framework.record.history import History, iso_of
from stratagem.framework.record.live import picture, state_of
from stratagem.framework.record.log_file import LogFile
from stratagem.framework.record.report import report
from tiny import MakeFit, Regressor, regression_rows

BEGIN = {"step": 0, "event": "begin", "max_steps": 100, "time": iso_of(1.8e9)}


NAMES = st.sampled_from(["step", "loss", "event", "time", "a", "eval_loss", "grad_norm"])


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "time": iso_of(1.8e9 + step), "loss": 1.0 / (step + 1), "learning_rate": 0.1, **more}


def write(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def shown(*runs: Run, columns: int = 100) -> str:
    console = Console(width=columns, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(picture(runs, columns))
    return console.export_text()


def history_of(*lines: Any) -> History:
    history = History()
    for each in lines:
        history.take(each)
    return history


# Curves.


@given(st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), min_size=1, max_size=400), st.integers(3, 60))
def test_a_thinned_curve_keeps_order_extremes_and_the_end(values: list[float | None], most: int) -> None:
    steps = [float(step) for step in range(len(values))]
    kept_steps, kept = thin(steps, values, most)
    assert len(kept) <= most and kept_steps == sorted(set(kept_steps))
    assert all(values[int(step)] == value for step, value in zip(kept_steps, kept, strict=True))
    finite = [value for value in values if value is not None]
    if finite:
        there = [value for value in kept if value is not None]
        assert (min(there), max(there)) == (min(finite), max(finite))
    assert kept_steps[-1] == steps[-1]


def test_a_long_curve_stays_small_and_keeps_its_one_spike() -> None:
    curve = Curve()
    for step in range(200_000):
        curve.add(step, 1000.0 if step == 77_777 else math.sin(step))
    assert len(curve.steps) <= curve.kept and curve.count == 200_000
    assert max(curve.finite) == 1000.0 and curve.steps[curve.values.index(1000.0)] == 77_777


# The log.


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LogFile(path)
    assert log.read() == (False, [])
    path.write_bytes(b'{"step": 1}\n{"step": ')
    assert log.read() == (False, [{"step": 1}])
    assert log.read() == (False, [])
    with path.open("ab") as file:
        file.write(b'2}\nnonsense\n\n{"step": 3}\n{"step": 4')
    assert log.read() == (False, [{"step": 2}, {"step": 3}]) and log.damaged == 1
    path.unlink()
    assert log.read() == (False, [])


def test_a_log_that_is_replaced_or_cut_short_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = LogFile(path)
    write(path, {"step": 1}, {"step": 2})
    assert log.read()[1] == [{"step": 1}, {"step": 2}]
    other = tmp_path / "other"
    write(other, {"step": 7}, {"step": 8}, {"step": 9})
    os.replace(other, path)
    assert log.read() == (True, [{"step": 7}, {"step": 8}, {"step": 9}])
    path.write_text('{"step": 5}\n')
    assert log.read() == (True, [{"step": 5}])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(lambda step, loss: json.dumps({"step": step, "loss": loss}).encode(), st.integers(), st.floats()),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
                max_leaves=8,
            ).map(lambda value: json.dumps(value).encode()),
            st.dictionaries(
                st.sampled_from(["step", "event", "time", "loss", "epoch", "checkpoint", "reason", "run_name",
                                 "eval_loss", "max_steps", "train_runtime", "slowest_rank", "data_wait_seconds"]),
                st.one_of(st.integers(0, 9), st.floats(), st.text(max_size=6), st.none(), st.just(iso_of(1.8e9)),
                          st.sampled_from(["begin", "resume", "save", "remove", "finish", "fail", "interrupt", "nan"])),
                max_size=8,
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=25,
    ),
    st.integers(1, 30),
)  # fmt: skip
def test_whatever_is_in_a_log_is_read_and_shown(tmp_path_factory: Any, lines: list[bytes], part: int) -> None:
    directory = tmp_path_factory.mktemp("run")
    whole, run = b"\n".join(lines) + b"\n", Run(directory)
    with (directory / "log.jsonl").open("wb", buffering=0) as file:
        for first in range(0, len(whole), max(part, len(whole) // 12 + 1)):
            file.write(whole[first : first + max(part, len(whole) // 12 + 1)])
            run.read()
    at_once = Run(directory)
    at_once.read()
    # Read in pieces or at once, it is the same.
    assert run.history.curves.keys() == at_once.history.curves.keys()
    assert repr(run.history.last) == repr(at_once.history.last)
    assert run.history.sessions == at_once.history.sessions and run.history.step == at_once.history.step
    assert shown(run, columns=40) and shown(run, at_once, columns=120)
    assert report(directory, {}, run.history).endswith("</html>\n")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["sessions", "arguments", "module", "host", "device", "program", "git", "versions", "strategy",
                         "metrics", "best", "earlier_runs", "world_size", "run_name", "max_steps", "checkpoints"]),
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                st.sampled_from(["given", "settled", "not_defaults", "state", "began", "name", "value", "is", "a",
                                 "host", "changed_arguments", "children", "changed", "update", "process", "reason"]),
                inner, max_size=4),
            max_leaves=10,
        ),
        max_size=10,
    )
)  # fmt: skip
def test_whatever_is_in_a_record_is_shown(tmp_path_factory: Any, record: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("run")
    (directory / "run.json").write_text(json.dumps(record))
    write(directory / "log.jsonl", BEGIN, line(1), line(2))
    run = Run(directory)
    run.read()
    assert report(directory, run.record, run.history).endswith("</html>\n")
    assert shown(run)


def test_a_resume_forgets_what_is_done_again() -> None:
    lines = [BEGIN, *(line(step) for step in range(1, 8)), {"step": 7, "event": "save", "checkpoint": "checkpoint-7"}]
    history = history_of(*lines, {"step": 4, "event": "resume", "max_steps": 100}, line(5), line(6))
    assert history.curves["loss"].steps == [1, 2, 3, 4, 5, 6] and history.checkpoints == {}
    assert [(each.kind, each.update, each.last_update) for each in history.sessions] == [
        ("begin", 0, 7),
        ("resume", 4, 6),
    ]


def test_a_run_that_begins_anew_in_the_file_is_the_one_that_counts() -> None:
    history = history_of(BEGIN, line(1), line(2), BEGIN, line(1))
    assert history.curves["loss"].steps == [1] and history.earlier_runs == 1 and len(history.sessions) == 1


def test_logs_of_earlier_versions_have_no_times_and_no_ends() -> None:
    history = history_of({"step": 0, "event": "begin"}, {"step": 5, "loss": 0.5}, {"step": 5, "train_runtime": 2.0})
    assert history.state == "finished" and history.time is None and history.totals == {"train_runtime": 2.0}
    assert history.curves.keys() == {"loss"}


def test_rates_are_by_the_clock() -> None:
    history = history_of(BEGIN, *({**line(10 * n), "time": iso_of(1.8e9 + n * 2)} for n in range(1, 5)))
    assert history.curves["updates_per_second"].values == pytest.approx([5, 5, 5, 5])
    assert history.updates_per_second == pytest.approx(5)


# Watching.


def test_what_watch_shows_of_a_run(tmp_path: Path) -> None:
    now = time.time()
    lines = [{**line(step), "time": iso_of(now - 30 + step)} for step in range(1, 31)]
    evaluation = {"step": 30, "eval_loss": 0.25, "time": iso_of(now)}
    write(
        tmp_path / "r" / "log.jsonl",
        {**BEGIN, "time": iso_of(now - 30), "run_name": "a [red]name[/]"},
        *lines,
        evaluation,
    )
    (run,) = runs_in(tmp_path)
    run.read()
    text = shown(run)
    for said in (
        "a [red]name[/]",
        "running",
        "update 30 / 100",
        "30%",
        "left",
        "0.25",
        "eval loss",
        "learning rate 0.1",
    ):
        assert said in text
    assert re.search("[\u2800-\u28ff]{3}", text)  # the curve
    assert max(len(row) for row in text.splitlines()) <= 100


@pytest.mark.parametrize(
    ("end", "state", "said"),
    [
        ({"event": "finish"}, "finished", "finished"),
        ({"event": "fail", "reason": "ValueError: \x1b[2Jno"}, "failed", "ValueError: �[2Jno"),
        ({"event": "interrupt", "reason": "by SIGTERM"}, "interrupted", "by SIGTERM"),
        (None, "silent", "no sign of life for"),
    ],
)
def test_how_a_run_stands(tmp_path: Path, end: dict[str, Any] | None, state: str, said: str) -> None:
    lines = [BEGIN, *(line(step) for step in range(1, 9))]
    write(tmp_path / "log.jsonl", *lines, *([{"step": 8, "time": iso_of(1.8e9 + 9), **end}] if end else []))
    run = Run(tmp_path)
    run.read()
    # All of it was long ago, or is yet to come, by this machine's clock.
    run.silent_for = lambda: 1e6  # type: ignore[method-assign]
    assert state_of(run)[0] == state and said in shown(run) and "\x1b" not in shown(run)


def test_a_process_that_is_gone_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", BEGIN, line(1))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = os.uname().nodename
    (tmp_path / "run.json").write_text(json.dumps({"sessions": [{"host": host, "process": child.pid}]}))
    run = Run(tmp_path)
    run.read()
    run.silent_for = lambda: 7.0  # type: ignore[method-assign]
    assert state_of(run) == ("failed", "its process is gone; the last sign of life was 7 s ago")


def test_several_runs_are_found_below_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "deeper/two", ".hidden/no", "checkpoint-4/no"):
        write(tmp_path / name / "log.jsonl", BEGIN, line(3))
    assert [run.directory.name for run in runs_in(tmp_path)] == ["two", "one"]
    assert main(["watch", "--once", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "one" in printed and "two" in printed and "3 /" in printed
    assert main(["watch", "--once", str(tmp_path / "nothing")]) == 1
    assert "There is no run" in capsys.readouterr().out


@pytest.mark.slow
def test_watch_in_a_terminal_follows_a_run_until_ctrl_c(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    write(tmp_path / "log.jsonl", {**BEGIN, "time": iso_of(time.time())}, line(1))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stratagem", "watch", str(tmp_path), "--interval", "0.1"]
    child = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    seen = ""

    def wait_for(said: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while said not in seen:
            assert time.monotonic() < deadline, seen[-3000:]
            if select.select([controller], [], [], 1)[0]:
                seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(controller, 65536).decode())

    wait_for("update 1 / 100")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps(line(42)) + "\n")
    wait_for("update 42 / 100")
    shutil.rmtree(tmp_path)
    write(tmp_path / "log.jsonl", BEGIN, line(7))  # another file
    wait_for("update 7 / 100")
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    os.close(controller)


# The command.


def test_the_command_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert {"parity", "watch", "report"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and re.match(r"stratagem \d+\.\d+", capsys.readouterr().out)


def two_runs(make_fit: MakeFit, tmp_path: Path) -> list[str]:
    rows = regression_rows(16)
    for name, rate in (("slow", 0.01), ("fast", 0.2)):
        options: dict[str, Any] = {"learning_rate": rate, "loggers": ["jsonl"], "report": True, "logging_steps": 1}
        fit = make_fit(
            Regressor(), rows, rows[:4], max_steps=6, eval_strategy="steps", eval_steps=3, run_name=f"<{name}>",
            output_dir=str(tmp_path / name), **options,
        )  # fmt: skip
        fit.train()
    return [str(tmp_path / "slow"), str(tmp_path / "fast")]


def test_the_report_of_a_run_from_its_directory(
    make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, _ = two_runs(make_fit, tmp_path)
    written = (tmp_path / "slow" / "report.html").read_text()
    assert main(["report", slow]) == 0
    assert capsys.readouterr().out.strip() == f"{slow}/report.html"
    again = (tmp_path / "slow" / "report.html").read_text()

    def losses(page: str) -> Any:
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
        return json.loads(data)[0]["lines"]

    assert losses(again) == losses(written)  # from the disk as from the run itself
    (tmp_path / "slow" / "run.json").unlink()
    assert main(["report", slow, "--output", str(tmp_path / "elsewhere" / "page.html")]) == 0
    assert losses((tmp_path / "elsewhere" / "page.html").read_text()) == losses(written)


def test_runs_are_compared(
    make_fit: MakeFit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = two_runs(make_fit, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["report", *runs, runs[0]]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    assert "&lt;slow&gt; · train" in page and "<slow>" not in page and len(page) < 1_000_000
    differs = page.partition("What differs")[2].partition("<section>")[0]
    cell = r"<td><code>(\S+)</code></td>"
    assert re.findall(f"<tr>{cell * 3}</tr>", differs) == [("learning_rate", "0.01", "0.2")]


def test_a_report_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2 and "there is no run in" in capsys.readouterr().err


# The size, and what it costs.


def test_ten_thousand_lines_make_a_small_page() -> None:
    history = history_of(BEGIN, *(line(step, grad_norm=1.0, **{f"extra_{n}": step % 7 * n for n in range(70)})
                                  for step in range(1, 10_001)))  # fmt: skip
    assert len(report(Path("nowhere"), {}, history)) < 1_000_000


# A browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("error", (event) => document.title = "error: " + event.message);
addEventListener("load", () => setTimeout(() => {
  const figure = document.querySelector("figure.wide"), svg = figure.querySelector("svg");
  const before = svg.querySelector("polyline").getAttribute("points"), box = svg.getBoundingClientRect();
  figure.querySelector("button").click();
  const moved = svg.querySelector("polyline").getAttribute("points") !== before;
  const at = { clientX: box.left + box.width * 0.6, clientY: box.top + 50, bubbles: true };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = figure.querySelector(".tip");
  document.getElementById("theme").click();
  const wide = document.documentElement.scrollWidth <= innerWidth;
  document.title = JSON.stringify({ moved, tip: tip.hidden ? "" : tip.textContent, fits: wide,
    theme: document.documentElement.dataset.theme, ticks: svg.querySelectorAll("text").length });
}, 200));</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_draws_it_and_shows_values_under_the_pointer(make_fit: MakeFit, tmp_path: Path, width: int) -> None:
    two_runs(make_fit, tmp_path)
    page = tmp_path / "probe.html"
    page.write_text((tmp_path / "slow" / "report.html").read_text().replace("</body>", PROBE))
    done = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)[:1]
    found = json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["moved"] and found["fits"] and found["theme"] == "dark" and found["ticks"] > 4
    assert found["tip"].startswith("update 4") and "train 0." in found["tip"]
