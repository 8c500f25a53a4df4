"""One output_dir on several ranks: they share it or are refused, are of one run, and fail together; orphans end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem.framework.checkpoint import CheckpointError, read_state, write
from stratagem.framework.checkpoint.contents import Snapshot
from stratagem.framework.checkpoint.writing import share_of
from training import Tagger, make_fit, make_strategy, token_rows

pytestmark = pytest.mark.slow

SAVING: dict[str, Any] = {
    "strategy": "ddp",
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
}
HERE = Path(__file__).parent


def train_in(output: str, directories: list[str] | None = None, resume: Any = None, **arguments: Any) -> str:
    """A run, each rank in a working directory of its own where those are given: what it raised, or its run's id."""
    before = Path.cwd()
    if directories is not None:
        os.chdir(directories[int(os.environ["RANK"])])
    try:
        fit = make_fit(Tagger(), token_rows(), output_dir=output, **{**SAVING, **arguments})
        fit.train(resume_from_checkpoint=resume)
        return fit.saver.directory.line.id
    except CheckpointError as error:
        return str(error)
    finally:
        os.chdir(before)


def all_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_ranks_that_dont_share_the_directory_are_refused_before_the_first_update(
    ranks: dict[int, Ranks], tmp_path: Path
) -> None:
    places = [tmp_path / f"machine-{rank}" for rank in range(2)]
    for place in places:
        place.mkdir()
    told = ranks[2].run(train_in, output="output", directories=[str(place) for place in places])
    for said in told:
        assert said.startswith(f"rank 1: {places[1]}/output isn't the directory that rank 0 writes to: line.json")
        assert "on a filesystem that all machines share" in said
    assert [all_in(place) for place in places] == [[], []]
    # A run of before lies there on both.
    for place in places:
        train_in(str(place / "output"), strategy="single")
    before = all_in(places[1])
    told = ranks[2].run(train_in, output="output", directories=[str(place) for place in places])
    assert all("rank 1: " in said and "isn't there" in said for said in told)
    assert all_in(places[1]) == before


def save_apart(directories: list[str]) -> tuple[str, list[str]]:
    """Write a snapshot, each rank to its own path: what was raised, and what is left there."""
    strategy = make_strategy("ddp")
    from stratagem.precision.registry import get_precision

    strategy.set_up(get_precision("32-true"))
    place = Path(directories[strategy.rank])
    snapshot = Snapshot({"weight": torch.ones(3)}, {}, "{}", "{}")
    try:
        write(share_of(snapshot, strategy), place / "checkpoint-4", strategy)
    except CheckpointError as error:
        return str(error), all_in(place)
    return "", all_in(place)


def test_a_part_that_rank_0_doesnt_see_is_never_published(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    places = [tmp_path / f"machine-{rank}" for rank in range(2)]
    for place in places:
        (place / "checkpoint-4.partial").mkdir(parents=True)
    for said, left in ranks[2].run(save_apart, directories=[str(place) for place in places]):
        assert "rank 1 wrote random-00001.json to a directory that rank 0 doesn't see" in said
        assert left == []
    same = [str(tmp_path / "shared")] * 2
    Path(same[0]).mkdir()
    assert [said for said, _ in ranks[2].run(save_apart, directories=same)] == ["", ""]
    listed = json.loads((tmp_path / "shared" / "checkpoint-4" / "manifest.json").read_text())["files"]
    assert {"random-00000.json", "random-00001.json"} < listed.keys()
    assert all((tmp_path / "shared" / "checkpoint-4" / name).is_file() for name in listed)


def test_all_ranks_are_of_one_run(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    output = tmp_path / "output"
    first = ranks[2].run(train_in, output=str(output))
    again = ranks[2].run(train_in, output=str(output), resume=True, max_steps=6)
    back = ranks[2].run(train_in, output=str(output), resume=str(output / "checkpoint-2"))
    anew = ranks[2].run(train_in, output=str(output))
    ids = [first[0], again[0], back[0], anew[0]]
    assert [first, again, back, anew] == [[name, name] for name in ids]
    assert ids[0] == ids[1] and len({*ids}) == 3 and all(len(name) == 16 for name in ids)
    assert read_state(output / "checkpoint-4")["run"] == {"id": anew[0], "ancestors": []}


@pytest.mark.parametrize("name", ["checkpoint-8.partial", "checkpoint-8.replaced", "checkpoint-2"])
def test_what_cant_be_removed_is_told_on_all_ranks(ranks: dict[int, Ranks], tmp_path: Path, name: str) -> None:
    output = tmp_path / "output"
    ranks[2].run(train_in, output=str(output))
    stubborn = output / name
    stubborn.mkdir(exist_ok=True)
    # Not even root may unlink in a directory that is immutable.
    if subprocess.run(["chattr", "+i", stubborn], capture_output=True, check=False).returncode:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", stubborn], capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip("neither chattr nor mount is allowed here")
    try:
        told = ranks[2].run(train_in, output=str(output), resume=True, max_steps=8, save_total_limit=1)
        assert told[0] == told[1]
        assert str(output) in told[0] and name in told[0]
    finally:
        subprocess.run(["chattr", "-i", stubborn], capture_output=True, check=False)
        subprocess.run(["umount", stubborn], capture_output=True, check=False)


PROGRAM = """
import os, sys, time
from pathlib import Path
from stratagem import Callback, Fit
from training import Tagger, token_rows

class Tell(Callback):
    def on_step_end(self, args, state, control, **context):
        Path(sys.argv[1], f"pid-{os.environ['RANK']}").write_text(f"{os.getpid()} {state.global_step}")
        time.sleep(0.05)

fit = Fit(Tagger(), token_rows(), strategy="ddp", callbacks=[Tell()], output_dir=sys.argv[1] + "/output",
          max_steps=int(sys.argv[2]), save_steps=5, loggers=(), progress=False)
fit.train(resume_from_checkpoint=True)
"""


def is_alive(pid: int) -> bool:
    """Whether a process is there that hasn't ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_ranks_of_a_killed_torchrun_end_and_their_run_goes_on_at_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    agent = subprocess.Popen([*torchrun, str(tmp_path), "100000"], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 150
        while not (tmp_path / "output" / "checkpoint-5").is_dir():
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        pids = [int((tmp_path / f"pid-{rank}").read_text().split()[0]) for rank in (0, 1)]
        assert all(map(is_alive, pids))
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    killed = time.monotonic()
    while any(map(is_alive, pids)) and time.monotonic() < killed + 30:
        time.sleep(0.05)
    took = time.monotonic() - killed
    for pid in filter(is_alive, pids):
        os.kill(pid, signal.SIGKILL)
    assert took < 10
    saved = max(int(path.name.split("-")[1]) for path in (tmp_path / "output").glob("checkpoint-*[0-9]"))
    done = subprocess.run(
        [*torchrun, str(tmp_path), str(saved + 5)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    lines = {json.dumps(read_state(path)["run"]) for path in (tmp_path / "output").glob("checkpoint-*[0-9]")}
    assert len(lines) == 1
