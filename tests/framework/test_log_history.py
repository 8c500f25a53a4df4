"""The logs of a run in a file that its checkpoints share: a save costs the same after many, and none is lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as draw
from stratagem import Callback
from stratagem.framework.checkpoint import log_history
from stratagem.framework.checkpoint.directory import CheckpointError, partial_path
from stratagem.framework.checkpoint.log_history import HISTORY, LogHistory, read_history
from tiny import Dropping, MakeFit, Regressor, regression_rows

NOT_OF_THE_WEIGHTS = ("seconds", "runtime", "per_second", "memory", "flos")
QUICK = settings(deadline=None, derandomize=True)


def numbers(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logs without what the clock says."""
    return [{k: v for k, v in log.items() if not any(part in k for part in NOT_OF_THE_WEIGHTS)} for log in logs]


def save(history: LogHistory, entries: list[dict[str, Any]], final: Path) -> dict[str, Any]:
    """Save what was logged as a checkpoint does; what its state.json would say."""
    part = history.take(entries)
    partial = partial_path(final)
    partial.mkdir()
    part.place(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return {"log_history": vars(part.mark)}


class Holds(Callback):
    """Has the run log many entries, as if it were old, and counts what saves write."""

    def __init__(self, before: int) -> None:
        self.before = before

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        state.log_history.extend({"loss": 0.5, "step": 0} for _ in range(self.before))


def test_a_save_writes_as_much_after_many_logs_as_after_few(
    make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, encode = [0], log_history.line_of

    def count(entry: dict[str, Any]) -> bytes:
        lines[0] += 1
        return encode(entry)

    monkeypatch.setattr(log_history, "line_of", count)
    sizes, encoded = {}, {}
    for before in (10, 20_000):
        path = tmp_path / str(before)
        options = {"output_dir": str(path), "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
        fit = make_fit(Regressor(), regression_rows(32), max_steps=2, callbacks=[Holds(before)], **options)
        fit.train()
        lines[0] = 0
        fit.log({"more": 1.0})
        fit.state.global_step = 3
        saved = fit.save_checkpoint()
        sizes[before], encoded[before] = (saved / "state.json").stat().st_size, lines[0]
        first = path / "checkpoint-2" / HISTORY
        assert os.path.samefile(first, saved / HISTORY)
        assert len(first.read_text().splitlines()) == before + 2 + 2  # two losses, the totals and one more
    assert encoded[10] == encoded[20_000] <= 4  # the totals, the one more, and the last of those before
    assert abs(sizes[10] - sizes[20_000]) < 30  # digits


PROGRAM = """
import os, signal, sys, torch
from stratagem import Fit
from stratagem.framework.checkpoint import log_history
from tiny import Dropping, regression_rows

def torn(self, folder, mark, entries):
    real(self, folder, mark, entries)
    if folder.name.startswith("checkpoint-9"):
        with open(folder / "log_history.jsonl", "ab") as file:
            file.write(b'{"loss": 0.')  # of a save that never ended
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

real = log_history.SharedFile.place
log_history.SharedFile.place = torn
torch.set_num_threads(1)
torch.manual_seed(1)
Fit(
    Dropping(), regression_rows(60), max_steps=12, output_dir=sys.argv[1], save_strategy="steps", save_steps=3,
    logging_steps=1, per_device_train_batch_size=4, loggers=(), progress=False, report=False,
).train()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_logs_up_to_its_checkpoint(tmp_path: Path) -> None:
    """Really killed, in the middle of a save, when the shared file has logs beyond the newest checkpoint; going on
    there, from an older one, and from one that was copied alone, in another directory: the logs are those of the run
    that nobody killed.
    """
    import torch
    from stratagem import Fit

    place = tmp_path / "run"
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(place)], env={**os.environ, "PYTHONPATH": path})
    assert ended.returncode == -signal.SIGKILL
    assert sorted(path.name for path in place.glob("checkpoint-*")) == [
        "checkpoint-3", "checkpoint-6", "checkpoint-9.partial"
    ]  # fmt: skip
    for path_of in (place / "checkpoint-3", place / "checkpoint-6"):
        beyond = (path_of / HISTORY).read_bytes()
        assert beyond.count(b"\n") == 9 and beyond.endswith(b'{"loss": 0.')

    def train(output_dir: Path, resume: Any = None) -> list[dict[str, Any]]:
        torch.manual_seed(1)
        fit = Fit(
            Dropping(), regression_rows(60), max_steps=12, output_dir=str(output_dir), save_strategy="steps",
            save_steps=3, logging_steps=1, per_device_train_batch_size=4, loggers=(), progress=False, report=False,
        )  # fmt: skip
        fit.train(resume_from_checkpoint=resume)
        return numbers(fit.state.log_history)

    expected = train(tmp_path / "whole")
    alone = tmp_path / "elsewhere" / "checkpoint-3"
    shutil.copytree(place / "checkpoint-3", alone)
    assert train(tmp_path / "from-older", place / "checkpoint-3") == expected
    assert train(place, True) == expected
    shutil.rmtree(place)
    assert train(tmp_path / "another", alone) == expected
    assert train(tmp_path / "third", tmp_path / "another" / "checkpoint-9") == expected


@settings(QUICK, max_examples=60)
@given(
    steps=draw.lists(draw.sampled_from(["log", "save", "remove", "resume", "replace", "fail", "no links"]), max_size=25)
)
def test_every_checkpoint_has_its_own_logs_whatever_happens_between(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("run")
    history, entries, kept = LogHistory(), [], {}  # type: ignore[var-annotated]
    link = os.link
    for number, step in enumerate(["log", *steps, "save"]):
        if step == "log":
            entries.append({"loss": number / 3, "step": number})
        elif step == "replace":
            entries = entries[: len(entries) // 2]
        elif step == "remove" and kept:
            shutil.rmtree(directory / kept.popitem()[0])
        elif step == "resume" and kept:
            name, (state, expected) = next(iter(kept.items()))
            found = read_history(directory / name, state)
            assert found.problem is None and found.entries == expected
            history, entries = LogHistory(), list(found.entries)
            history.go_on_from(found)
        elif step == "fail":  # the disk is full in the middle of a line
            partial = directory / "failed.partial"
            partial.mkdir()
            history.take(entries).place(partial)
            with (partial / HISTORY).open("ab") as file:
                file.write(b'{"los')
            shutil.rmtree(partial)
        elif step in ("save", "no links"):
            name = f"checkpoint-{number}"
            try:
                if step == "no links":
                    os.link = refuse
                kept[name] = save(history, entries, directory / name), list(entries)
            finally:
                os.link = link
        for name, (state, expected) in kept.items():
            found = read_history(directory / name, state)
            assert found.problem is None and found.entries == expected


def refuse(*args: Any) -> None:
    raise OSError(errno.EPERM, "no hard links here")


ENTRIES = [{"loss": 1 / 3, "text": "é\n", "step": step} for step in range(6)]


@settings(QUICK, max_examples=150)
@given(draw.data())
def test_of_a_file_that_was_cut_off_or_altered_the_whole_lines_are_left_and_it_is_said(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    directory = tmp_path_factory.mktemp("run")
    state = save(LogHistory(), ENTRIES, directory / "checkpoint-1")
    file = directory / "checkpoint-1" / HISTORY
    whole = file.read_bytes()
    cut = data.draw(draw.integers(0, len(whole)))
    tail = data.draw(draw.binary(max_size=30) | draw.sampled_from([b"[]\n", b"[" * 5000 + b"\n", b'{"loss": 1}\n']))
    file.write_bytes(whole[:cut] + tail)
    found = read_history(directory / "checkpoint-1", state)
    if (whole[:cut] + tail).startswith(whole):  # what lies beyond it was logged later
        assert found.entries == ENTRIES and found.problem is None
        return
    lines = whole[:cut].count(b"\n")
    assert found.entries[:lines] == ENTRIES[:lines] and all(isinstance(entry, dict) for entry in found.entries)
    if not tail:
        assert len(found.entries) == lines
    assert found.mark is None and found.problem is not None and str(file) in found.problem
    assert f"{len(found.entries)} of 6 logs are left" in found.problem


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_run_goes_on_without_the_logs_that_are_lost_and_says_so(
    make_fit: MakeFit, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4}
    expected = make_fit(Dropping(), regression_rows(40), max_steps=8, **options)
    expected.train()
    path = tmp_path / "output" / "checkpoint-4"
    text = (path / HISTORY).read_text()
    os.unlink(path / HISTORY)
    if damage != "missing":
        lines = text.splitlines(keepends=True)
        (path / HISTORY).write_text("".join(lines[:2]) + lines[2][:9] if damage == "cut" else text.replace("1", "2"))
    fit = make_fit(Dropping(), regression_rows(40), max_steps=8, output_dir=str(tmp_path / "second"), **options)
    fit.train(resume_from_checkpoint=path)
    left = {"missing": 0, "cut": 2, "altered": 4}[damage]
    assert f"{path / HISTORY} isn't what was saved" in capsys.readouterr().err
    assert len(fit.state.log_history) == left + 5
    assert numbers(fit.state.log_history[left:]) == numbers(expected.state.log_history[4:])
    again = make_fit(Dropping(), regression_rows(40), max_steps=8, output_dir=str(tmp_path / "third"), **options)
    again.train(resume_from_checkpoint=tmp_path / "second" / "checkpoint-8")
    assert again.state.log_history[:-1] == fit.state.log_history[:-1]


def test_the_list_is_the_users_and_what_json_cant_hold_is_an_error_by_name(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(Regressor(), regression_rows(8), max_steps=1, save_strategy="no")
    fit.train()
    fit.save_checkpoint()
    for change in (
        lambda: fit.state.log_history.clear(),
        lambda: fit.state.log_history.append({"mine": 1}),
        lambda: setattr(fit.state, "log_history", [{"other": 2}, {"mine": 1}]),
        lambda: fit.state.log_history.pop(),
        lambda: fit.state.log_history[0].update(other=3),
    ):  # type: Callable[[], object]
        change()
        path = fit.save_checkpoint()
        state = json.loads((path / "state.json").read_text())
        assert read_history(path, state).entries == fit.state.log_history
    fit.state.log_history.append({"mine": object()})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"log_history.*object is not JSON serializable"):
        fit.save_checkpoint()
    assert sorted(tmp_path.rglob("*")) == before
