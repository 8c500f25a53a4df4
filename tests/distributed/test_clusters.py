"""Ranks that srun or mpirun started, by the environment that these write: they train as those of our launcher."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "launched.py"
SECONDS = 240  # until ranks count as hung; other work may share the cores


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def srun(nodes: str, by_node: str) -> list[dict[str, str]]:
    """What srun writes for each of two tasks; the job's number gives a port that no other test takes."""
    step = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": by_node,
    }
    local = by_node == "2"
    return [
        {**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank * local), "SLURM_NODEID": str(rank * (not local))}
        for rank in (0, 1)
    ]


def mpirun() -> list[dict[str, str]]:
    """What Open MPI's mpirun writes for two ranks of one machine."""
    names = "RANK", "LOCAL_RANK"
    sizes = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": f"prte-{free_port()}@1"}
    return [{**sizes, **{f"OMPI_COMM_WORLD_{name}": str(rank) for name in names}} for rank in (0, 1)]


def start(
    output: Path, environments: list[dict[str, str]], *options: str, program: Path = PROGRAM
) -> list[tuple[int, str]]:
    """Start a program once in each environment, and wait.

    Returns:
        The status of each, and what it printed.
    """
    started = ("RANK", "WORLD_SIZE", "SLURM_", "OMPI_", "PMI_", "STRATAGEM_", "TORCHELASTIC_", "MASTER_", "LOCAL_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(started)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(output), *options],
            env={**own, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def outcome(output: Path) -> tuple[list[float], bytes]:
    """The losses that were logged, and the weights at the end."""
    for rank in (0, 1):
        assert (output / f"rank-{rank}.txt").read_text() == "8 updates, attempt 0"
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 8
    return losses, (output / "end.safetensors").read_bytes()


@cache
def by_our_launcher(strategy: str) -> tuple[list[float], bytes]:
    output = Path(mkdtemp())
    [(status, said)] = start(output, [{}], "--strategy", strategy, "--devices", "2")
    assert status == 0, said
    return outcome(output)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_ranks_of_srun_on_one_node(strategy: str, tmp_path: Path) -> None:
    for status, said in start(tmp_path, srun("node07", "2"), "--strategy", strategy):
        assert status == 0, said
    assert outcome(tmp_path) == by_our_launcher(strategy)


def test_ranks_of_srun_on_two_nodes_meet_on_the_first(tmp_path: Path) -> None:
    for status, said in start(tmp_path, srun("localhost,node08", "1(x2)"), "--devices", "1"):
        assert status == 0, said
    assert outcome(tmp_path) == by_our_launcher("ddp")


def test_ranks_of_mpirun(tmp_path: Path) -> None:
    for status, said in start(tmp_path, mpirun()):
        assert status == 0, said
    assert outcome(tmp_path) == by_our_launcher("ddp")


def test_other_numbers_are_refused_by_every_task(tmp_path: Path) -> None:
    for status, said in start(tmp_path, srun("node07", "2"), "--devices", "4"):
        assert status == 1
        assert "ValueError: devices=4, but srun started 2 tasks. Write srun --ntasks-per-node=4 --nodes=1" in said
    for status, said in start(tmp_path, srun("node[07-08]", "1(x2)"), "--strategy", "single"):
        assert status == 1
        assert "ValueError: strategy='single' runs in one process, but 2 ranks were started" in said
