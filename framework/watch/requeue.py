"""SLURM runs an interrupted job again: one rank asks for it, once the run is saved."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from ...strategies.base import Strategy
from ...strategies.statuses import PREEMPTED
from ..checkpoint.directory import MANIFEST
from ..printing import say
from .endings import Interrupted

SECONDS = 30.0  # that scontrol has to answer


def check_requeue() -> None:
    """Refuse to requeue what can't be.

    Raises:
        ValueError: this process is in no job of SLURM's, or can't run scontrol.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise ValueError(
            "requeue=True asks SLURM to run the job again, but this process is in none: SLURM_JOB_ID isn't set. Submit "
            "the program by sbatch, or leave requeue out."
        )
    if shutil.which("scontrol") is None:
        raise ValueError(
            f"requeue=True has SLURM run the job {job_name()} again by scontrol, which isn't on the PATH. Bind it into "
            "a container, with SLURM's configuration and munge's socket, or leave requeue out."
        )


def job_name() -> str:
    """The name by which scontrol knows this process's job; a task of an array has its own."""
    if {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"} <= os.environ.keys():
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


@contextmanager
def requeued(strategy: Strategy, asked: bool) -> Iterator[None]:
    """In here a run is under way. Where a signal interrupts it and it was saved, rank 0 has SLURM run the job again;
    after Ctrl-C, which is a user's own, it doesn't.

    Args:
        strategy: set up.
        asked: the argument ``requeue``; without it, only a restart by SLURM is said.
    """
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    if restarts != "0" and "SLURM_JOB_ID" in os.environ and strategy.is_main:
        say(f"SLURM's job {job_name()} was requeued: SLURM_RESTART_COUNT={restarts}.", sys.stderr)
    try:
        yield
    except Interrupted as ended:
        if asked and ended.status == PREEMPTED:
            if strategy.is_main:
                is_whole = ended.path is not None and (ended.path / MANIFEST).is_file()
                say(ask_scontrol(job_name()) if is_whole else "Not requeued: the run wasn't saved.", sys.stderr)
            # A launcher that sees one rank end ends the others, and rank 0 may still be asking.
            with suppress(RuntimeError):  # another rank is gone
                strategy.all_say("requeued", SECONDS + 5.0)
        raise


@cache  # a process asks once for a job, however often it is interrupted
def ask_scontrol(job: str) -> str:
    """Have SLURM run a job again, and return what came of it.

    Args:
        job: its name.
    """
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM's job {job} is not requeued: {error}. Submit it again; it goes on from its newest checkpoint."
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or "it said nothing"
        return (
            f"SLURM's job {job} is not requeued: scontrol requeue ended with status {done.returncode} ({said}). Submit "
            "it again; it goes on from its newest checkpoint."
        )
    return f"SLURM's job {job} is requeued, and goes on from its newest checkpoint."
