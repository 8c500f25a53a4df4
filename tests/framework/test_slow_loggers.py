"""Loggers that are slow, stall or fail cost training nothing, and what is missing is said."""

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from stratagem import Callback, GradientHistograms
from stratagem.framework.loggers import Logger, LoggerWarning, channel, together
from tiny import MakeFit, Regressor, StopAt, lines_of, regression_rows

ROWS = regression_rows(8)


class Stalls(Logger):
    """Waits in its first log until it is told to go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.is_in_first = threading.Event()
        self.told: list[Any] = []
        self.threads: set[str] = set()

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.is_in_first.set()
        self.may_go_on.wait(60)
        self.told.append((step, sorted(metrics)[-1]))

    def close(self) -> None:
        self.told.append("closed")


class Notes(Logger):
    """Notes steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append(step)


def test_a_logger_that_stalls_costs_the_loop_nothing(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "AFTER_TRAINING", 0.2)
    stalls, notes = Stalls(), Notes()
    fit = make_fit(Regressor(), ROWS, max_steps=30, logging_steps=1, loggers=[stalls, notes])
    began = time.monotonic()
    with pytest.warns(LoggerWarning, match=r"The logger Stalls is behind: 32 of its calls weren't made within 0\.2 s"):
        assert fit.train().global_step == 30
    assert time.monotonic() - began < 30 and stalls.is_in_first.is_set() and stalls.told == []
    assert notes.steps == [*range(1, 31), 30]  # another logger isn't kept waiting
    monkeypatch.setattr(together, "AFTER_TRAINING", 50.0)
    began = time.monotonic()
    with pytest.warns(LoggerWarning, match=r"is behind: 33 of its calls"):
        fit.loggers.flush()  # nothing has moved since somebody waited in vain: it isn't waited for again
    assert time.monotonic() - began < 10
    monkeypatch.setattr(together, "AT_THE_END", 0.1)
    with pytest.warns(
        LoggerWarning, match=r"is behind: 34 of its calls .* If the process ends now, they are lost there\."
    ):
        fit.close()
    monkeypatch.undo()
    stalls.may_go_on.set()
    fit.evaluate(ROWS)
    fit.close()
    assert [step for step, *_ in stalls.told if isinstance(step, int)] == [*range(1, 31), 30, 30]
    assert [each for each in stalls.told if each == "closed"] == ["closed", "closed"]
    assert stalls.threads == {"stratagem Stalls"}


def test_the_oldest_numbers_go_where_too_many_wait(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MOST_CALLS", 10)
    monkeypatch.setattr(together, "AFTER_TRAINING", 0.1)
    stalls = Stalls()

    class Waits(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 2:
                assert stalls.is_in_first.wait(30)

    fit = make_fit(Regressor(), ROWS, max_steps=30, logging_steps=1, loggers=[stalls], callbacks=[Waits()])
    with pytest.warns(LoggerWarning) as warned:
        fit.train()
        stalls.may_go_on.set()
        fit.close()
    assert [step for step, _ in stalls.told[:-1]] == [1, *range(22, 31), 30]
    said = [str(each.message) for each in warned]
    assert said[0].startswith("The logger Stalls is too slow: the oldest of the numbers that wait for it are left out")
    assert said[-1] == "The logger Stalls was too slow: 20 logs are missing where it writes."


def test_pictures_are_counted_by_their_bytes(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MOST_BYTES", 100_000)

    class Pictures(Stalls):
        def image(self, name: str, image: Any, step: int) -> None:
            self.told.append((step, image.shape))

    pictures = Pictures()
    fit = make_fit(Regressor(), ROWS, max_steps=1, loggers=[pictures])
    fit.log({"number": 1.0})
    assert pictures.is_in_first.wait(30)
    for step in range(10):
        fit.loggers.image("big", torch.zeros(100, 100, 3), step)  # 30,000 bytes each
    pictures.may_go_on.set()
    with pytest.warns(LoggerWarning, match="7 logs are missing"):
        fit.close()
    assert [step for step, what in pictures.told[:-1] if what == (100, 100, 3)] == [7, 8, 9]


def test_a_logger_that_cant_be_opened_is_tried_again(make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "RETRY_AFTER", 0.0)

    class Late(Notes):
        tries = 0
        begun: list[int] = []

        def open(self, fit: Any) -> None:
            self.tries += 1
            if self.tries < 3:
                raise ConnectionError("not yet")

        def begin(self, fit: Any) -> None:
            self.begun.append(fit.state.global_step)

    late = Late()
    fit = make_fit(Regressor(), ROWS, max_steps=4, logging_steps=1, loggers=[late])
    with pytest.warns(LoggerWarning, match=r"raised in open \(ConnectionError: not yet\)"):
        fit.train()
        fit.close()
    assert late.steps == [2, 3, 4, 4] and late.begun == [0]


def test_what_the_thread_is_told_is_what_was_when_it_was_told(make_fit: MakeFit) -> None:
    class Asks(Stalls):
        def open(self, fit: Any) -> None:
            assert self.may_go_on.wait(60)
            self.told.append((fit.state.global_step, fit.args.max_steps, fit.settings()["ranks"], fit.name))

    asks = Asks()

    class LetsGo(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 3:
                asks.may_go_on.set()

    make_fit(Regressor(), ROWS, max_steps=4, loggers=[asks], callbacks=[LetsGo()], run_name="mine").train()
    assert asks.told[0] == (0, 4, 1, "mine")


@pytest.mark.slow
def test_threads_are_there_where_they_are_needed_and_sleep(make_fit: MakeFit) -> None:
    def threads() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name.startswith("stratagem N")]

    fit = make_fit(Regressor(), ROWS, max_steps=2, loggers=["jsonl", "csv", Notes()])
    assert threads() == []
    fit.train()
    assert threads() == ["stratagem Notes"]
    (thread,) = (each for each in threading.enumerate() if each.name == "stratagem Notes")
    assert thread.daemon

    def switches() -> int:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)

    before = switches()
    time.sleep(2)
    assert switches() - before <= 2
    fit.close()
    thread.join(10)
    assert threads() == []
    fit.train()
    del fit
    gc.collect()
    assert threads() == []


PROGRAM = """
import sys, time
from stratagem import Callback, Fit, Logger
from stratagem.framework.loggers import together
from tiny import Regressor, regression_rows
together.AT_THE_END = 2.0
class Sleeps(Logger):
    def log(self, metrics, step):
        time.sleep(600)
class Ends(Callback):
    def on_step_end(self, args, state, control, **context):
        if state.global_step == 3:
            {end}
fit = Fit(Regressor(), regression_rows(8), callbacks=[Ends()], loggers=["jsonl", Sleeps()], save_strategy="no",
          output_dir=sys.argv[1], max_steps=5, logging_steps=1, progress=False)
fit.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "logs", "within"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, 2, 60),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(2)", 143, 3, 60),
        ("raise RuntimeError('it failed')", 1, 2, 60),
        ("pass", 0, 6, 90),
    ],
)
def test_a_process_ends_while_a_logger_stalls(end: str, status: int, logs: int, within: float, tmp_path: Path) -> None:
    """And log.jsonl holds what was logged until then."""
    places = filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=within,
    )
    assert done.returncode == status, done.stderr
    assert len([line for line in lines_of(tmp_path / "log.jsonl") if "event" not in line]) == logs
    if status >= 0:
        assert "LoggerWarning: The logger Sleeps is behind" in done.stderr


FORKS = """
import os, sys
from stratagem import Fit, Logger
from tiny import Regressor, regression_rows
class Writes(Logger):
    def open(self, fit):
        self.file = open(os.path.join(sys.argv[1], "told.txt"), "a")
    def log(self, metrics, step):
        print(os.getpid() == parent, step, file=self.file, flush=True)
    def close(self):
        print(os.getpid() == parent, "closed", file=self.file, flush=True)
parent = os.getpid()
fit = Fit(Regressor(), regression_rows(8), loggers=[Writes()], save_strategy="no", output_dir=sys.argv[1], max_steps=1,
          progress=False)
fit.train()
child = os.fork()
if child == 0:
    fit.loggers.flush()
    fit.loggers.close()  # of the parent's loggers, which are none of its business
    fit.log({"number": 1.0})
    fit.loggers.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
fit.log({"number": 1.0})
"""


@pytest.mark.slow
def test_loggers_survive_a_fork(tmp_path: Path) -> None:
    places = filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run([sys.executable, "-c", FORKS, str(tmp_path)], env=environment, check=True, timeout=120)
    told = (tmp_path / "told.txt").read_text().splitlines()
    assert told == ["True 1", "True 1", "False 1", "False closed", "True 1", "True closed"]


# Other things than numbers.


class Shows(Notes):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Any] = []

    def image(self, name: str, image: Any, step: int) -> None:
        self.shown.append((name, image, step))

    def histogram(self, name: str, histogram: Any, step: int) -> None:
        self.shown.append((name, histogram, step))

    def table(self, name: str, columns: Any, rows: Any, step: int) -> None:
        self.shown.append((name, columns, rows, step))


def test_images_of_every_shape(make_fit: MakeFit) -> None:
    shows = Shows()
    fit = make_fit(Regressor(), ROWS, max_steps=1, loggers=[shows])
    image = torch.rand(4, 6, 3)
    given = {
        "hwc": image,
        "chw": image.permute(2, 0, 1),
        "rgba": torch.cat([image, torch.ones(4, 6, 1)], dim=2),
        "bytes": (image * 255 + 0.5).to(torch.uint8),
        "numpy": image.numpy(),
        "half": image.half(),
    }
    for name, each in given.items():
        fit.loggers.image(name, each)
    fit.loggers.image("grey", image[:, :, 0], step=12)
    fit.loggers.image("mask", image[:, :, 0] > 0.5)
    image.zero_()  # what the caller does afterwards changes nothing
    fit.close()
    first = shows.shown[0][1]
    assert first.dtype == numpy.uint8 and first.shape == (4, 6, 3) and first.max() > 0
    for name, shown, _ in shows.shown[: len(given)]:
        assert numpy.abs(shown.astype(int) - first).max() <= (1 if name == "half" else 0), name
    _, grey, step = shows.shown[-2]
    assert step == 12 and (grey == first[:, :, :1]).all()
    assert set(numpy.unique(shows.shown[-1][1])) <= {0, 255}
    for wrong in (torch.zeros(4), torch.zeros(2, 3, 4, 5), torch.zeros(5, 6, 7), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=r"The image 'wrong' has the shape .* Pass \(height, width\)"):
            fit.loggers.image("wrong", wrong)


def test_histograms_and_tables(make_fit: MakeFit) -> None:
    shows = Shows()
    fit = make_fit(Regressor(), ROWS, max_steps=1, loggers=[shows])
    fit.loggers.histogram("values", torch.tensor([0.0, 1.0, 1.0, float("nan"), float("inf")]))
    fit.loggers.histogram("counted", ([3, 4], [0.0, 0.5, 1.0]))
    fit.loggers.table("cases", ("a", 2), iter([(1, "x"), (2, "y")]))
    with pytest.raises(ValueError, match="has 2 counts and 2 edges"):
        fit.loggers.histogram("wrong", ([3, 4], [0.0, 0.5]))
    with pytest.raises(ValueError, match="'wrong' has 2 columns, and a row of 3 cells"):
        fit.loggers.table("wrong", ["a", "b"], [[1, 2], [1, 2, 3]])
    fit.close()
    (_, values, _), (_, counted, _), table = shows.shown
    assert values.counts.sum() == 3 and values.counts[-1] == 2 and len(values.edges) == len(values.counts) + 1
    assert counted.counts.tolist() == [3, 4]
    assert table == ("cases", ["a", "2"], [[1, "x"], [2, "y"]], 0)


def test_loggers_without_a_verb_leave_it_out_and_say_so_once(
    make_fit: MakeFit, capsys: pytest.CaptureFixture[str]
) -> None:
    shows = Shows()
    fit = make_fit(Regressor(), ROWS, max_steps=1, loggers=["jsonl", shows])
    for step in range(3):
        fit.loggers.image("picture", torch.zeros(2, 2), step)
        fit.loggers.text("remark", "words")
    fit.close()
    assert [step for _, _, step in shows.shown] == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == [
        "fit.loggers.image: left out by JsonLinesLogger, which can't show it.",
        "fit.loggers.text: left out by JsonLinesLogger, Shows, which can't show it.",
    ]
    make_fit(Regressor(), ROWS, max_steps=1, loggers=[]).loggers.image("nobody looks", torch.zeros(2, 2))


def test_a_module_may_be_given_the_loggers(make_fit: MakeFit) -> None:
    class Showing(Regressor):
        def loss(self, outputs: Any, batch: Any) -> Any:
            if self.training:
                self.shown.histogram("outputs", outputs)
            return super().loss(outputs, batch)

    shows, module = Shows(), Showing()
    with make_fit(module, ROWS, max_steps=2, per_device_train_batch_size=2, loggers=[shows]) as fit:
        module.shown = fit.loggers
        fit.train()
    assert [step for _, _, step in shows.shown] == [0, 1]


def test_gradients_are_counted_at_logs_and_nothing_else_changes(make_fit: MakeFit) -> None:
    shows, found = Shows(), []
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 12, "logging_steps": 2}
    torch.manual_seed(0)

    class Keeps(Callback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
            if state.global_step + 1 == 4:
                found.append(fit.module.hidden.weight.grad.clone())

    module = Regressor()
    with make_fit(module, ROWS, loggers=[shows], callbacks=[GradientHistograms(3, bins=5), Keeps()], **options) as fit:
        fit.train()
    names = [name for name, _ in module.named_parameters()]
    assert [(name, step) for name, _, step in shows.shown] == [
        (f"gradients/{name}", step) for step in (4, 8, 12) for name in names
    ]
    (histogram,) = (each for name, each, step in shows.shown if (name, step) == ("gradients/hidden.weight", 4))
    counts, edges = numpy.histogram(found[0].numpy(), bins=5)
    assert histogram.counts.tolist() == counts.tolist() and histogram.edges == pytest.approx(edges)
    torch.manual_seed(0)
    plain = Regressor()
    make_fit(plain, ROWS, loggers=[], **options).train()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_gradients_that_cant_be_shown_are_refused(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match="every and bins must be at least 1"):
        GradientHistograms(0)
    fit = make_fit(Regressor(), ROWS, max_steps=1, logging_strategy="epoch", callbacks=[GradientHistograms()])
    with pytest.raises(ValueError, match="goes by the logs of updates, and logging_strategy='epoch'"):
        fit.train()
    fit = make_fit(Regressor(), ROWS, max_steps=1, strategy="fsdp2", callbacks=[GradientHistograms()])
    with pytest.raises(ValueError, match="strategy='fsdp2' leaves each rank a part"):
        fit.train()


# The table of comma-separated values.


def test_csv_has_a_row_for_each_log_and_goes_on(make_fit: MakeFit, tmp_path: Path) -> None:
    import csv

    def table(name: str = "metrics.csv") -> list[dict[str, str]]:
        with (tmp_path / "output" / name).open(newline="") as file:
            return list(csv.DictReader(file))

    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "loggers": ["csv"],
        "max_steps": 5,
    }
    fit = make_fit(Regressor(), ROWS, ROWS[:2], callbacks=[StopAt(3)], **options)
    fit.train()
    fit.evaluate()
    assert [row["step"] for row in table()] == ["1", "2", "3", "3", "3"]
    assert float(table()[0]["loss"]) == fit.state.log_history[0]["loss"] and table()[0]["eval_loss"] == ""
    assert float(table()[-1]["eval_loss"]) == fit.state.log_history[-1]["eval_loss"]
    with (tmp_path / "output" / "metrics.csv").open("a") as file:
        file.write("4,0.")  # a run was killed here
    make_fit(Regressor(), ROWS, **options).train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
    assert [row["step"] for row in table()] == ["1", "2", "3", "4", "5", "5"]
    make_fit(Regressor(), ROWS, **{**options, "max_steps": 1}).train()
    assert [row["step"] for row in table("metrics-1.csv")] == ["1", "2", "3", "4", "5", "5"]
    assert [row["step"] for row in table()] == ["1", "1"]


def test_warnings_of_the_thread_come_from_the_main_one(make_fit: MakeFit) -> None:
    class Fails(Logger):
        def log(self, metrics: dict[str, float], step: int) -> None:
            sys.exit("as if it were at home")

    threads = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *given, **named: threads.append(threading.current_thread())  # type: ignore
        fit = make_fit(Regressor(), ROWS, max_steps=2, logging_steps=1, loggers=[Fails()])
        assert fit.train().global_step == 2
        fit.close()
    assert threads == [threading.main_thread()] * 2
