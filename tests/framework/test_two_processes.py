"""Two processes never work in one output_dir, whatever becomes of the first; a kill on the way there loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stratagem import Callback
from stratagem.framework.checkpoint import CheckpointError, locking
from tiny import Dropping, MakeFit, regression_rows

HERE = Path(__file__).parent


def run_program(*arguments: object) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE.parent)])}
    done = subprocess.run(
        [sys.executable, str(HERE / "two_processes.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_is_refused_or_takes_over(tmp_path: Path) -> None:
    told = run_program("cases", tmp_path)
    first = told["first"]
    for case in ("resumes", "begins anew", "goes back", "saves by hand"):
        refusal = told[case]["raised"]
        assert refusal.startswith("CheckpointError"), case
        assert f"is in use by process {first['pid']} on " in refusal and f", run {first['run']}, since 20" in refusal
    assert told["only reads"] == {"gave": 4, "said": ""}
    # None of them touched what the first one was writing, and it came to its end.
    assert told["left"] == ["checkpoint-2", "checkpoint-4.partial", "config.yaml", "line.json", "run.lock"]
    assert (first["ended at"], first["left"]) == ("6", [2, 4, 6])
    assert told["after it"] == {"gave": 8, "said": ""}
    # One that was killed has let go, also where its forked children live on; one that is about to end is waited for.
    assert told["killed"] == {"gave": 6, "said": "", "left": [2, 4, 6]}
    assert told["its worker lives"]["gave"] == 4
    assert told["waits for its end"] == {"gave": 8, "left": [2, 4, 6, 8]}


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_claims_the_directory_loses_nothing(tmp_path: Path) -> None:
    kills = run_program("claims", tmp_path, 1)
    for killed in kills:
        assert killed["gave"] == 7
        own = ["checkpoint-7"]
        if not killed["is claimed"]:  # the old run goes on, and its older ones were one too many
            assert killed["left"] == own, killed
        elif killed["way"] == "begins anew":
            aside = [f"checkpoint-{step}.set-aside" for step in (2, 4, 6)]
            assert (killed["parent"], killed["left"]) == ([], [*aside, *own]), killed
        else:
            aside = [f"checkpoint-{step}.set-aside" for step in (4, 6)]
            assert (killed["parent"], killed["left"]) == ([2], [*aside, *own]), killed
    moments = {(killed["way"], killed["before"]) for killed in kills if killed["is claimed"]}
    assert {("begins anew", f"os.rename checkpoint-{step}") for step in (2, 4, 6)} < moments
    assert {("goes back", f"os.rename checkpoint-{step}") for step in (4, 6)} < moments


def test_a_second_fit_of_the_same_process_is_refused_while_the_first_trains(make_fit: MakeFit, tmp_path: Path) -> None:
    refused = []

    class Nested(Callback):
        def on_step_end(self, *_: Any, **context: Any) -> None:
            link = tmp_path / "link"
            if not link.exists():
                link.symlink_to(tmp_path / "output")
            for directory in (tmp_path / "output", link):
                saves = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(directory)}
                other = make_fit(Dropping(), regression_rows(22), max_steps=2, **saves)
                with pytest.raises(CheckpointError, match="in use by another Fit of this process"):
                    other.train()
                refused.append(directory)

    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    make_fit(Dropping(), regression_rows(22), callbacks=[Nested()], **options).train()
    assert len(refused) == 4
    again = make_fit(Dropping(), regression_rows(22), **options)
    assert again.train().global_step == 2  # one after the other
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert not (tmp_path / "output" / "run.lock").exists()


def test_a_run_that_fails_lets_go(make_fit: MakeFit, tmp_path: Path) -> None:
    class Fail(Callback):
        def on_step_end(self, *_: Any, **context: Any) -> None:
            raise RuntimeError("of the user")

    options = {"max_steps": 2, "save_strategy": "steps", "per_device_train_batch_size": 4}
    with pytest.raises(RuntimeError, match="of the user"):
        make_fit(Dropping(), regression_rows(22), callbacks=[Fail()], **options).train()
    assert not (tmp_path / "output").exists()
    assert locking.held == {}


def test_a_filesystem_without_locks_is_said_once(
    make_fit: MakeFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    for _ in range(2):
        make_fit(Dropping(), regression_rows(22), **options).train(resume_from_checkpoint=True)
    assert capsys.readouterr().err.count(f"{tmp_path}/output can't be locked (No locks available)") == 1
