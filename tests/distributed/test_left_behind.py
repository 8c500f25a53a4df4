"""After a run has ended, however it did: no process of it is left, and nothing of it lies in shared memory."""

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "elastic.py"
NAME = "STRATAGEM_TEST_OF_WHAT_IS_LEFT"  # every process of a run inherits it


def processes(value: str) -> dict[int, str]:
    """The living processes that have the variable."""
    found = {}
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            has_it = f"{NAME}={value}".encode() in environment.read_bytes().split(b"\0")
            command = (environment.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            is_zombie = (environment.parent / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if has_it and not is_zombie:
            found[int(environment.parent.name)] = command
    return found


@pytest.mark.parametrize(
    ("fault", "status"),
    [("Kill(rank=1", 137), ("Exit(3, rank=0", 3), ("Stop(rank=1", None), ("SignalLauncher(15, rank=0", 143)],
)
def test_nothing_is_left(tmp_path: Path, fault: str, status: int | None) -> None:
    mark = uuid.uuid4().hex
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    options = ["--devices", "2", "--workers", "1", "--fault", f"{fault}, update=4)"]
    started = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(tmp_path), *options],
        env={**kept, "OMP_NUM_THREADS": "1", NAME: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if status is None:  # nobody fails: the one that stands still is ended with the others by a second signal
        deadline = time.monotonic() + 120.0
        while not is_any_stopped(mark):
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.1)
        started.terminate()
        time.sleep(3.0)
        started.terminate()
    _, errors = started.communicate(timeout=180.0)
    assert started.returncode == (143 if status is None else status), errors
    deadline = time.monotonic() + 5.0  # a worker notices within seconds that its parent is gone
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    of_run = {pid for path in tmp_path.glob("processes-*.json") for pid in json.loads(path.read_text())}
    assert len(of_run) >= 4  # two ranks, and a worker of each
    shared = [path.name for path in Path("/dev/shm").iterdir()]
    assert not [name for name in shared if any(f"_{pid}_" in name or f"-{pid}-" in name for pid in of_run)]


def is_any_stopped(mark: str) -> bool:
    def state(process: int) -> str:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    return any(state(process) == "T" for process in processes(mark))
