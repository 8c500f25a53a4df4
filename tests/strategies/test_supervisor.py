"""The supervisor over real processes: small programs that end in all the ways in which ranks do."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stratagem.strategies import supervisor
from stratagem.strategies.supervisor import Launch, supervise

ROOT = Path(__file__).parents[2]
BEGIN = """
import os, signal, sys, time
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
def note(what):
    with open(f"{sys.argv[1]}/{attempt}-{rank}", "a") as file:
        file.write(what + "\\n")
note("size " + os.environ["WORLD_SIZE"])
def wait_for(path):
    while not os.path.exists(f"{sys.argv[1]}/{path}"):
        time.sleep(0.01)
"""
STORE = """
import torch.distributed as dist
from stratagem.strategies.failures import Failure, Failures, found_dead
server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
here = dist.PrefixStore(f"attempt{attempt}", server)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATIENCE", "BETWEEN", "TOGETHER"):
        monkeypatch.setattr(supervisor, name, 0.5)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = children_of(os.getpid())
    yield
    assert children_of(os.getpid()) <= before


def children_of(parent: int) -> set[int]:
    """The processes, zombies too, that a process has."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(stat.parent.name))
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(program: str, directory: Path, most: int = 2, fewest: int = 0, max_restarts: int = 0, **options: Any) -> int:
    command = [sys.executable, "-c", BEGIN + program, str(directory)]
    return supervise(Launch(command, fewest or most, most, max_restarts, **options))


def notes(directory: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().split("\n")[:-1] for path in directory.glob("[0-9]-[0-9]")}


def signal_when(directory: Path, names: list[str], *numbers: int, seconds: float = 0.0) -> threading.Thread:
    """Send this process signals once files are there: when the ranks are ready."""

    def send() -> None:
        deadline = time.monotonic() + 20.0
        while not all((directory / name).exists() for name in names) and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(seconds)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_ranks_are_told_their_place(tmp_path: Path) -> None:
    assert run("for name in sorted(os.environ): note(name + '=' + os.environ[name])", tmp_path) == 0
    for rank in ("0", "1"):
        found = dict(line.split("=", 1) for line in notes(tmp_path)[f"0-{rank}"] if "=" in line)
        assert [found[name] for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")] == [rank] * 3
        assert [found[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")] == ["2"] * 3
        assert (found["GROUP_RANK"], found["TORCHELASTIC_USE_AGENT_STORE"]) == ("0", "True")
        assert found["STRATAGEM_LAUNCHER"] == str(os.getpid()) and int(found["MASTER_PORT"]) > 0


def test_a_killed_rank_is_named_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # The other rank doesn't listen to SIGTERM.
    program = "signal.signal(signal.SIGTERM, lambda *_: note('SIGTERM'))\nnote('ready')\n"
    program += "if rank == '1': wait_for('0-0'); time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)\n"
    program += "while True: time.sleep(1.0)"
    begin = time.monotonic()
    assert run(program, tmp_path) == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 10.0
    lines = capfd.readouterr().err.splitlines()
    assert (
        lines[0] == f"Rank 1 (host {supervisor.socket.gethostname()}) was killed by SIGKILL (out of memory? see dmesg)."
    )
    assert lines[1:] == ["Rank 1 failed first, with exit code -9; the others were ended."]
    assert notes(tmp_path) == {"0-0": ["size 2", "ready", "SIGTERM"], "0-1": ["size 2", "ready"]}


def test_a_stopped_rank_is_ended_with_the_others(tmp_path: Path) -> None:
    program = "if rank == '1': wait_for('0-0'); sys.exit(3)\nos.kill(os.getpid(), signal.SIGSTOP)"
    begin = time.monotonic()
    assert run(program, tmp_path) == 3
    assert time.monotonic() - begin < 10.0


def test_an_exit_without_a_word_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("sys.exit(7 if rank == '0' else 0)", tmp_path) == 7
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("Rank 0 (host ") and said[0].endswith(") ended with status 7.")
    assert said[1] == "Rank 0 failed first, with exit code 7; the others were ended."


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)]
)
def test_a_signal_is_passed_on_once_and_ends_the_run(tmp_path: Path, number: int, status: int) -> None:
    program = f"""
came = []
def noted(number, frame):
    note(signal.Signals(number).name); came.append(number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(number, noted)
note("ready"); open(f"{{sys.argv[1]}}/ready{{rank}}", "w")
while not came: time.sleep(0.01)
time.sleep(0.2)
sys.exit({status})
"""
    sender = signal_when(tmp_path, ["ready0", "ready1"], number)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    assert run(program, tmp_path, max_restarts=3, signals=signals) == status
    sender.join()
    name = "SIGTERM" if number == signal.SIGHUP else signal.Signals(number).name
    assert notes(tmp_path) == {f"0-{rank}": ["size 2", "ready", name] for rank in (0, 1)}
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_ranks_that_die_of_the_signal_are_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sender = signal_when(tmp_path, ["0-0", "0-1"], signal.SIGTERM)
    assert run("time.sleep(60)", tmp_path, max_restarts=3) == 143
    sender.join()
    assert capfd.readouterr().err == ""


def test_a_second_signal_ends_all(tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: note("SIGTERM"))
open(f"{sys.argv[1]}/ready{rank}", "w")
while True: time.sleep(1.0)
"""
    begin = time.monotonic()
    sender = signal_when(tmp_path, ["ready0", "ready1"], signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, seconds=0.3)
    assert run(program, tmp_path) == 143
    sender.join()
    assert time.monotonic() - begin < 10.0
    # The second came too soon after the first, and counts as the same.
    assert notes(tmp_path) == {f"0-{rank}": ["size 2", "SIGTERM", "SIGTERM"] for rank in (0, 1)}


def test_a_rank_that_was_preempted_by_itself_is_not_started_again(tmp_path: Path) -> None:
    assert run("sys.exit(143)", tmp_path, max_restarts=2) == 143
    assert sorted(notes(tmp_path)) == ["0-0", "0-1"]


def test_a_failure_after_a_signal_is_the_status_and_no_restart(tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(4 if rank == "0" else 143))
open(f"{sys.argv[1]}/ready{rank}", "w")
while True: time.sleep(1.0)
"""
    sender = signal_when(tmp_path, ["ready0", "ready1"], signal.SIGTERM)
    assert run(program, tmp_path, max_restarts=2) == 4
    sender.join()
    assert sorted(notes(tmp_path)) == ["0-0", "0-1"]


def test_restarts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = "if rank == '1': wait_for(attempt + '-0')\nsys.exit(5 if rank == '1' and attempt != '2' else 0)"
    assert run(program, tmp_path, max_restarts=2) == 0
    assert sorted(notes(tmp_path)) == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    assert "Starting again on 2 ranks (restart 2 of 2)." in capfd.readouterr().err
    assert run(program, tmp_path, max_restarts=1) == 5


def test_a_lost_rank_is_done_without_in_the_next_attempt(tmp_path: Path) -> None:
    program = "for other in range(int(os.environ['WORLD_SIZE'])): wait_for(f'{attempt}-{other}')\n"
    program += "if attempt == '0' and rank == '1' or attempt == '2': os.kill(os.getpid(), signal.SIGKILL)\n"
    program += "if attempt == '1': sys.exit(1)"
    assert run(program, tmp_path, fewest=1, max_restarts=3) == 0
    sizes = {name: lines[0] for name, lines in notes(tmp_path).items()}
    # Without the lost one; then all again, who are both lost, and of whom one is the fewest.
    assert sizes == {
        "0-0": "size 2", "0-1": "size 2", "1-0": "size 1", "2-0": "size 2", "2-1": "size 2", "3-0": "size 1",
    }  # fmt: skip


def test_a_rank_that_raises_is_not_lost(tmp_path: Path) -> None:
    assert run("sys.exit(attempt == '0' and rank == '1')", tmp_path, fewest=1, max_restarts=1) == 0
    assert notes(tmp_path)["1-1"] == ["size 2"]


def test_what_a_killed_rank_had_started_is_ended(tmp_path: Path) -> None:
    program = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(f"{sys.argv[1]}/child", "w").write(str(child.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(program, tmp_path, most=1) == 137
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5.0
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


@pytest.mark.slow
def test_the_first_failure_is_told_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 ends first, because of rank 1; and it learns from the store of a rank that was killed."""
    program = (
        STORE
        + """
if attempt == "0":
    if rank == "1":
        Failures(here, here).tell(Failure(1, "there", "RuntimeError: an accident"))
        note("told"); time.sleep(0.2); sys.exit(1)
    while not here.check(["failure"]): time.sleep(0.01)
    sys.exit(70)
if rank == "1": wait_for("ready"); os.kill(os.getpid(), signal.SIGSEGV)
open(sys.argv[1] + "/ready", "w")
while found_dead(here) is None: time.sleep(0.01)
note(str(found_dead(here))); sys.exit(70)
"""
    )
    assert run(program, tmp_path, max_restarts=1) == 128 + signal.SIGSEGV
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "Rank 1 failed first, with exit code 1; the others were ended."
    assert said[2].endswith("was killed by SIGSEGV (a crash outside of Python).")
    assert said[3] == "Rank 1 failed first, with exit code -11; the others were ended."
    host = supervisor.socket.gethostname()
    assert notes(tmp_path)["1-0"][1] == f"rank 1 (host {host}): was killed by SIGSEGV (a crash outside of Python)"


@pytest.mark.slow
@pytest.mark.parametrize("by", ["terminal", "group"])
def test_ctrl_c_reaches_each_rank_once(tmp_path: Path, by: str) -> None:
    """In a terminal of its own, where the kernel sends the signal to all processes in the foreground."""
    program = (
        BEGIN
        + """
came = []
signal.signal(signal.SIGINT, lambda *_: came.append(note("SIGINT")))
note("ready")
if os.getsid(0) != os.getpid(): note("the terminal reaches this rank")  # two signals may come as one
while not came: time.sleep(0.01)
time.sleep(0.5)
sys.exit(130)
"""
    )
    outer = f"""
import sys
from stratagem.strategies.supervisor import Launch, supervise
sys.exit(supervise(Launch([sys.executable, "-c", {program!r}, {str(tmp_path)!r}], 2, 2)))
"""
    mine, theirs = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + outer],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        deadline = time.monotonic() + 60.0
        while len(notes(tmp_path)) < 2 or any(len(lines) < 2 for lines in notes(tmp_path).values()):
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.05)
        if by == "terminal":
            os.write(mine, b"\x03")
        else:
            os.killpg(started.pid, signal.SIGINT)
        assert started.wait(30.0) == 130
    finally:
        started.kill()
        started.wait()
        os.close(mine)
    assert notes(tmp_path) == {f"0-{rank}": ["size 2", "ready", "SIGINT"] for rank in (0, 1)}
