"""Every block of docs/clusters.md runs on this machine, on two ranks: with stand-ins for srun, mpirun and their like,
which set what those set, and with a real Ray.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")
SECONDS = 240
STAND_INS = {
    # What each sets for a task or rank; the command is what follows the options.
    "srun": """
job = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node1",
       "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
of_rank = lambda rank: {**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
""",
    "mpirun": """
of_rank = lambda rank: {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2",
                        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-" + str(os.getpid())}
""",
    "mpiexec": """
of_rank = lambda rank: {"PMI_RANK": rank, "MPI_LOCALRANKID": rank, "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
""",
}
START = """
command = sys.argv[sys.argv.index("python"):]
ranks = [subprocess.Popen(command, env={**os.environ, **of_rank(rank)}) for rank in ("0", "1")]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""


def block(language: str, containing: str) -> str:
    """The page's one block in a language that contains a text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    [found] = [text for text in blocks if containing in text]
    return str(found)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the page's program lies, and the stand-ins."""
    (tmp_path / "train.py").write_text(block("python", "# train.py"), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    for name, sets in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!{sys.executable}\nimport os, subprocess, sys\n{sets}{START}")
        program.chmod(0o755)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    return tmp_path


def start(directory: Path, command: str, *environments: Mapping[str, str]) -> None:
    """Run a command of the page's once in each environment, at the same time, to a good end."""
    started = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_", "STRATAGEM_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(started)}
    # The interpreter that runs the tests is the page's python, and its torchrun.
    own["PATH"] = os.pathsep.join([str(directory / "bin"), str(Path(sys.executable).parent), own["PATH"]])
    own |= {"OMP_NUM_THREADS": "1", "RUN": str(directory / "run")}
    processes = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=directory,
            env={**own, **environment},
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
    assert not any(process.returncode for process in processes), "\n".join(said)


def check_run(run: Path, ranks: int = 2) -> None:
    """The run was one of so many ranks, and came to its end."""
    state: dict[str, Any] = json.loads((run / "checkpoint-60" / "state.json").read_text())
    assert state["world_size"] == ranks
    losses = [entry["loss"] for entry in map(json.loads, (run / "log.jsonl").open()) if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_torchrun_on_every_machine(directory: Path) -> None:
    command = block("bash", "--rdzv-endpoint").replace("--nproc-per-node=8", "--nproc-per-node=1")
    command = command.replace("$HEAD:29400", f"$HEAD:{free_port()}")
    start(directory, command, *[{"HEAD": "127.0.0.1"}] * 2)
    check_run(directory / "run")


def test_slurms_script(directory: Path) -> None:
    script = block("bash", "#SBATCH")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script, flags=re.MULTILINE))
    assert len(options) == script.count("#SBATCH") and options["signal"] == "USR1@120" and "requeue" in options
    name = options["signal"].partition("@")[0]
    assert f'preemption_signals="SIGTERM,SIG{name}"' in block("python", "# train.py")
    script = script.replace("/shared/runs/first", str(directory / "run"))
    start(directory, script, {"SLURM_JOB_ID": free_port(), "SLURM_CPUS_PER_TASK": options["cpus-per-task"]})
    check_run(directory / "run")


def test_mpirun(directory: Path) -> None:
    start(directory, block("bash", "mpirun"), {"HEAD": "127.0.0.1"})
    check_run(directory / "run")


def test_mpiexec(directory: Path) -> None:
    [command] = re.findall(r"`(mpiexec [^`]+)`", PAGE)
    start(directory, command, {"HEAD": "127.0.0.1", "MASTER_PORT": free_port()})
    check_run(directory / "run")


def test_the_trainjob(directory: Path) -> None:
    job = yaml.safe_load(block("yaml", "TrainJob"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"} and set(job["spec"]) == {"runtimeRef", "trainer"}
    trainer = job["spec"]["trainer"]  # its fields in v1alpha1:
    assert {*trainer} <= {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    assert [variable["name"] for variable in trainer["env"]] == ["RUN"]
    port = free_port()
    pods = [
        {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": str(node),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        for node in range(trainer["numNodes"])
    ]
    start(directory, " ".join(trainer["command"]), *pods)
    check_run(directory / "run")


def test_skypilots_task(directory: Path) -> None:
    task = yaml.safe_load(block("yaml", "SKYPILOT"))
    assert {*task} == {"name", "num_nodes", "resources", "workdir", "envs", "run"} and {*task["envs"]} == {"RUN"}
    command = task["run"].replace("--master-port=29500", f"--master-port={free_port()}")
    sets = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
    }
    start(directory, command, *[{**sets, "SKYPILOT_NODE_RANK": str(node)} for node in range(task["num_nodes"])])
    check_run(directory / "run")


def test_ray(directory: Path) -> None:
    program = block("python", "fit_on_ray")
    program = program.replace("num_workers=(4, 8), use_gpu=True", 'num_workers=2, resources_per_worker={"CPU": 0.5}')
    program = program.replace("/shared/runs", str(directory / "runs"))
    (directory / "train_on_ray.py").write_text(program, encoding="utf-8")
    scratch = mkdtemp(prefix="ray-", dir="/tmp")  # sockets have names without room for pytest's
    try:
        start(directory, "python train_on_ray.py", {"RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0"})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    check_run(directory / "runs" / "first")
