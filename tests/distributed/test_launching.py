"""Starting ranks for real: from a plain script and by torchrun, and what becomes of the others when one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import token_rows, train

pytestmark = pytest.mark.slow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
PROGRAM = Path(__file__).parent / "launched.py"
SECONDS = 180  # until a launch counts as hung; other work may share the cores


@dataclass
class Launch:
    """How a launch ended.

    Attributes:
        status: of the process that was started.
        seconds: from the last update's log to the end.
        output, errors: what all of its processes wrote.
    """

    status: int
    seconds: float
    output: str
    errors: str


def launch(output: Path, *options: str, launcher: tuple[str, ...] = (sys.executable,)) -> Launch:
    """Start the program and wait for it."""
    output.mkdir(exist_ok=True)
    # A launch inside a rank would be no launch.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*launcher, str(PROGRAM), str(output), *options],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    seconds = time.time() - (output / "log.jsonl").stat().st_mtime
    return Launch(done.returncode, seconds, done.stdout, done.stderr)


def check_end(output: Path, attempt: int = 0) -> None:
    """Both ranks came to the end; the run was logged once and its weights are one device's."""
    for rank in (0, 1):
        assert (output / f"rank-{rank}.txt").read_text() == f"8 updates, attempt {attempt}"
    weights = load_file(output / "end.safetensors")
    train(data=token_rows(80), per_device_train_batch_size=16, max_steps=8, export=output / "single.safetensors")
    for name, weight in load_file(output / "single.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5)


def logged_steps(output: Path) -> list[int]:
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in entries if "loss" in entry]


def test_plain_script(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2")
    assert done.status == 0, done.errors
    check_end(tmp_path)
    assert logged_steps(tmp_path) == list(range(1, 9))
    # One display: what the run is, its last update, and how it ended are shown by one process.
    for shown in ("module     Tagger: .* parameters", "world      2 ranks$", r"update 8/8 \|", "finished   8 updates"):
        assert len(re.findall(f"^{shown}", done.output + done.errors, re.M)) == 1, (shown, done.output + done.errors)
    assert re.search(r"^batch      \d+ samples in an update = \d+ per device x 2 ranks$", done.output, re.M)
    said = "Starting 2 ranks: what stands before Fit has run here, and runs once more on each of them. "
    said += "`stratagem launch --devices 2 launched.py` runs it on the ranks alone."
    assert done.errors.count(said) == 1, done.errors
    assert "Traceback" not in done.errors and "terminate called" not in done.errors


def test_torchrun(tmp_path: Path) -> None:
    done = launch(tmp_path, "--strategy", "fsdp2", launcher=TORCHRUN)
    assert done.status == 0, done.errors
    check_end(tmp_path)
    assert logged_steps(tmp_path) == list(range(1, 9))


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Two agents that meet at one address, as they would on two machines: each rank is the first of its node.
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    meeting = ("--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank")
    with ThreadPoolExecutor() as nodes:
        launched = [
            nodes.submit(launch, tmp_path, "--strategy", "ddp", launcher=(*torchrun, *meeting, str(node)))
            for node in (0, 1)
        ]
    for done in launched:
        assert done.result().status == 0, done.result().errors
    check_end(tmp_path)
    assert logged_steps(tmp_path) == list(range(1, 9))


def test_out_of_memory_on_one_rank(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2", "--accident", "memory")
    assert done.status == 0, done.errors
    assert "beginning again with 4, and gradient_accumulation_steps=2" in done.errors
    check_end(tmp_path)
    assert logged_steps(tmp_path) == [*range(1, 6), *range(1, 9)]


def test_exception_on_one_rank_ends_all(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2", "--accident", "raise", "--strategy", "fsdp2")
    assert done.status == 1
    assert done.seconds < 20
    # Rank 1's traceback comes before any other.
    first = done.errors.index("Traceback (most recent call last)")
    others = done.errors.find("Traceback (most recent call last)", first + 1)
    accident = done.errors.index("RuntimeError: the accident on rank 1")
    assert first < accident and (others < 0 or accident < others)
    assert "Rank 1 failed first" in done.errors
    assert not list(tmp_path.glob("rank-*.txt"))


def test_exception_on_one_rank_can_save_nothing_and_says_so(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2", "--accident", "raise", "--save-on-exception")
    assert done.status == 1
    assert done.seconds < 100  # 10 of them for the rank that could have failed, too; a hang takes half an hour
    assert "RescueWarning: The exception that ends this run left no checkpoint: rank 1 failed after" in done.errors
    assert "Rank 1 failed first" in done.errors
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_killed_rank_ends_all(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2", "--accident", "kill")
    assert done.status == 128 + signal.SIGKILL
    assert done.seconds < 20
    # The supervisor's line comes before what the other rank has to say about its connections.
    said = re.search(r"^Rank 1 \(host .+\) was killed by SIGKILL", done.errors, re.MULTILINE)
    assert said and "Traceback" not in done.errors[: said.start()]
    assert "Rank 1 failed first, with exit code -9" in done.errors
    assert not list(tmp_path.glob("rank-*.txt"))


def test_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2", "--accident", "kill the launcher")
    assert done.status == -signal.SIGKILL
    # Rank 1 sleeps on for preemption_grace. What the ranks write to is open until the last of them has ended.
    assert done.seconds < 40
    assert not list(tmp_path.glob("rank-*.txt"))


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_a_launcher_that_is_told_to_end_has_its_ranks_save(tmp_path: Path, by_torchrun: bool) -> None:
    launcher = TORCHRUN if by_torchrun else (sys.executable,)
    options = () if by_torchrun else ("--devices", "2")
    done = launch(tmp_path, *options, "--accident", "signal the launcher", launcher=launcher)
    # torchrun ends with a status of its own; what its ranks ended with is in its report.
    assert done.status == (1 if by_torchrun else 143), done.errors
    assert len(list(tmp_path.glob("checkpoint-[67]"))) == 1, done.errors
    assert "The run was interrupted after update" in done.errors
    assert launch(tmp_path, *options, launcher=launcher).status == 0
    check_end(tmp_path)


def test_restart_continues(tmp_path: Path) -> None:
    done = launch(tmp_path, "--devices", "2", "--accident", "kill", "--max-restarts", "1")
    assert done.status == 0, done.errors
    check_end(tmp_path, attempt=1)
    # The second attempt began at the checkpoint of update 4, not anew.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert logged_steps(tmp_path).count(5) == 2 and logged_steps(tmp_path).count(4) == 1
