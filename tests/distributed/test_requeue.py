"""requeue=True: one rank has SLURM run an interrupted job again, by a scontrol that writes down what it is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stratagem import Fit, FitArguments
from stratagem.framework.watch import requeue
from test_clusters import outcome, srun, start
from training import Tagger, token_rows

PROGRAM = Path(__file__).parent / "requeued.py"
SCONTROL = """#!/bin/sh
echo "$@" >> "{calls}"
{then}
"""


def stub(directory: Path, then: str = "exit 0") -> dict[str, str]:
    """Write a scontrol, and return the environment that finds it first."""
    directory.mkdir()
    program = directory / "scontrol"
    program.write_text(SCONTROL.format(calls=directory / "calls.txt", then=then))
    program.chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}


def calls(directory: Path) -> list[str]:
    written = directory / "calls.txt"
    return written.read_text().splitlines() if written.exists() else []


@pytest.mark.slow
def test_a_requeued_run_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    found, output = stub(tmp_path / "bin"), tmp_path / "run"
    environments = [each | found for each in srun("node07", "2")]
    ended = start(output, environments, program=PROGRAM)
    assert [status for status, _ in ended] == [143, 143], ended
    job = environments[0]["SLURM_JOB_ID"]
    assert calls(tmp_path / "bin") == [f"requeue {job}"]
    assert f"SLURM's job {job} is requeued, and goes on from its newest checkpoint." in ended[0][1]
    assert "requeued" not in ended[1][1]
    # The signal came after the message of update 5: its wish travels in that of update 6.
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]

    again = start(output, [each | {"SLURM_RESTART_COUNT": "1"} for each in environments], program=PROGRAM)
    assert [status for status, _ in again] == [0, 0], again
    assert f"SLURM's job {job} was requeued: SLURM_RESTART_COUNT=1." in again[0][1]
    undisturbed = tmp_path / "undisturbed"
    start(undisturbed, [each | found for each in srun("node07", "2")], "--rank", "7", program=PROGRAM)
    assert outcome(output) == outcome(undisturbed)
    assert calls(tmp_path / "bin") == [f"requeue {job}"]


@pytest.mark.slow
def test_under_torchrun_in_a_batch_script(tmp_path: Path) -> None:
    # Its agent ends the other ranks as soon as one has ended, while scontrol takes its time.
    found, output = stub(tmp_path / "bin", "sleep 2; echo done >> " + str(tmp_path / "done")), tmp_path / "run"
    job = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "1", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(PROGRAM), str(output), "--sent", "SIGUSR1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **job, **found},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert calls(tmp_path / "bin") == ["requeue 70_4"], done.stderr
    assert (tmp_path / "done").exists()
    assert "SLURM's job 70_4 is requeued" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "sent", "asked", "status", "says"),
    [
        ("echo 'Job is not requeueable' >&2; exit 1", "SIGTERM", 1, 143, "status 1 (Job is not requeueable). Submit"),
        ("exit 0", "SIGINT", 0, 130, "interrupted after update 5"),
    ],
)
def test_what_else_may_happen(then: str, sent: str, asked: int, status: int, says: str, tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "72", **stub(tmp_path / "bin", then)}
    options = "--strategy", "single", "--rank", "0", "--sent", sent
    [(ended, said)] = start(tmp_path / "run", [environment], *options, program=PROGRAM)
    assert ended == status, said
    assert says in said
    assert calls(tmp_path / "bin") == ["requeue 72"] * asked
    assert "is requeued, and goes on" not in said


def test_a_process_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", stub(tmp_path / "bin")["PATH"])
    assert requeue.ask_scontrol("73") == requeue.ask_scontrol("73")
    assert calls(tmp_path / "bin") == ["requeue 73"]


def test_a_scontrol_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", stub(tmp_path / "bin", "exec sleep 60")["PATH"])
    monkeypatch.setattr(requeue, "SECONDS", 0.2)
    assert "job 74 is not requeued" in requeue.ask_scontrol("74")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    arguments = {"output_dir": str(tmp_path / "run"), "requeue": True, "progress": False}
    with pytest.raises(ValueError, match=r"requeue=True.*SLURM_JOB_ID isn't set"):
        Fit(Tagger(), token_rows(8), **arguments)
    monkeypatch.setenv("SLURM_JOB_ID", "75")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"requeue=True.*the job 75 again by scontrol, which isn't on the PATH"):
        Fit(Tagger(), token_rows(8), **arguments)
    monkeypatch.setenv("PATH", stub(tmp_path / "bin")["PATH"])
    with Fit(Tagger(), token_rows(8), token_rows(8), **arguments) as fit:
        with pytest.raises(ValueError, match=r"resume_from_checkpoint=None\) would begin at the same place each time"):
            fit.train()
        with pytest.raises(ValueError, match=r"requeue=True.*a search without storage="):
            fit.hyperparameter_search(lambda trial: {})
    with pytest.raises(ValueError, match="requeue=True: would run the job from the beginning with save_strategy='no'"):
        FitArguments(requeue=True, save_strategy="no")
