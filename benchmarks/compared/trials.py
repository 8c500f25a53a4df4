"""The trials: each starts runs of a contestant in processes of their own, and says in a few words what was seen."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from task import Task, whole_gradients

HERE = Path(__file__).parent
PATIENCE = 120.0  # seconds from an accident on, after which a run counts as one that doesn't end


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is left of one run.

    Attributes:
        status: of the process, or of torchrun; None where it was still there after ``PATIENCE`` and was killed.
        seconds: from the accident, or from the start where there was none, to the end.
        said: everything that it printed.
        notes: by rank, those of each update.
        last: the number of the last update, as the contestant counts; None where training didn't end.
    """

    status: int | None
    seconds: float
    said: str
    notes: list[list[dict[str, Any]]]
    last: int | None

    @property
    def first(self) -> int | None:
        """The number of the first update that this process made."""
        return None if self.last is None else self.last - len(self.notes[0]) + 1

    def samples(self) -> list[list[int]]:
        """Of each update, those of all ranks, sorted."""
        updates = zip(*self.notes, strict=False)
        return [sorted(sample for note in ranks for sample in note["samples"]) for ranks in updates]


def run(contestant: str, task: Task, world: int = 1) -> Seen:
    """Run a task to its end, in one process, or under torchrun on several ranks."""
    fields = json.dumps(dataclasses.asdict(task))
    command = [sys.executable, str(HERE / "rank.py"), contestant, fields]
    if world > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = launcher + command[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.time()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        status = wait(process, task)
        output.seek(0)
        said = output.read()
    notes = []
    for rank in range(world):
        path = Path(task.directory, f"notes-{task.life}-{rank}.jsonl")
        notes.append([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [])
    last = Path(task.directory, f"last-{task.life}-0")
    if task.accident and (rows := notes[task.accident_rank]):
        begun = max(row["time"] for row in rows)
    return Seen(status, time.time() - begun, said, notes, int(last.read_text()) if last.exists() else None)


def wait(process: "subprocess.Popen[Any]", task: Task) -> int | None:
    """Wait for a run, ``PATIENCE`` from its accident on, and kill its whole session where it doesn't end."""
    notes = Path(task.directory, f"notes-{task.life}-{task.accident_rank}.jsonl")
    begun = time.time()
    try:
        while process.poll() is None:
            happened = task.accident and notes.exists() and len(notes.read_text().splitlines()) >= task.accident_update
            if time.time() > (notes.stat().st_mtime + PATIENCE if happened else begun + 10 * PATIENCE):
                return None
            time.sleep(0.2)
        return process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def accumulated(contestant: str, directory: str) -> str:
    """Gradients of three updates of 16, 16 and 8 samples, beside those of one mean over all labels of the update."""
    found = []
    for world, accumulation in ((1, 4), (2, 2)):
        for whole in (True, False) if contestant in OWN_WAY else (True,):
            place = f"{directory}/{world}-{whole}"
            Path(place).mkdir()
            task = Task(place, accumulation=accumulation, whole_loss=whole)
            seen = run(contestant, task, world)
            differences = []
            for note, whole_gradient in zip(seen.notes[0], whole_gradients(task, 16), strict=False):
                difference = torch.tensor(note["gradient"]) - whole_gradient
                differences.append(f"{float(difference.norm() / whole_gradient.norm()):.0e}")
            named = "" if whole else " by default"
            found.append(f"{world} rank{'s' * (world > 1)}{named}: {', '.join(differences) or failure(seen)}")
    return "; ".join(found)


# Those that have a setting by which an update's loss is one mean, beside their default.
OWN_WAY = ("transformers_trainer", "composer_trainer")


# Those whose documentation asks for a loader with a state, to be resumed within an epoch.
STATEFUL = ("lightning_trainer",)


def resumed(contestant: str, directory: str, world: int = 1, world_after: int = 1, **fields: Any) -> str:
    """A run of 12 updates in epochs of 8, shuffled, is killed in update 7 and resumed from the checkpoint of update 5;
    beside one that nobody killed."""
    if fields.get("stateful_loader") and contestant not in STATEFUL:
        return "has no use for it"
    task = Task(
        directory + "/whole", updates=12, samples=64, micro_batch=8 // world, save_every=5, shuffle=True, **fields
    )
    Path(task.directory).mkdir()
    whole = run(contestant, task, world)
    if whole.last is None:
        return failure(whole)
    killed = dataclasses.replace(
        task, directory=directory + "/cut", accident="kill", accident_update=7, accident_rank=world - 1
    )
    Path(killed.directory).mkdir()
    run(contestant, killed, world)
    second = dataclasses.replace(task, directory=killed.directory, life=1, micro_batch=8 // world_after)
    after = run(contestant, second, world_after)
    if after.first is None:
        return failure(after)
    there = whole.notes[0][after.first - 1 :]
    same = whole.samples()[after.first - 1 :] == after.samples()
    bits = [note["weights"] for note in there] == [note["weights"] for note in after.notes[0]]
    seen_again = {*itertools.chain(*whole.samples()[:5])} & {*itertools.chain(*after.samples()[:3])}
    words = [f"from update {after.first}", "the same samples" if same else "other samples"]
    if not same and after.first == 6:
        words.append(f"{len(seen_again)} of the epoch's other 24 were seen before")
    if world == world_after:
        words.append("bitwise" if bits else "other weights")
    return ", ".join(words)


def failure(seen: Seen) -> str:
    """The last line of an error."""
    lines = [line for line in seen.said.splitlines() if "Error" in line or "Exception" in line]
    return f"status {seen.status}: {lines[-1].strip()[:160] if lines else seen.said.strip()[-160:]}"


def killed_in_save(contestant: str, directory: str) -> str:
    """The kernel kills the process in the write of the second checkpoint, at a size of 1 and of 6 MB of a file; one
    checkpoint is to stay. Then the run is resumed."""
    found = []
    for size in (1, 6):
        place = f"{directory}/{size}"
        Path(place).mkdir()
        accident = {"accident": "file_limit", "accident_update": 8, "file_bytes": size << 20}
        task = Task(place, updates=12, samples=64, width=1000, save_every=4, keep=1, **accident)
        killed = run(contestant, task)
        after = run(contestant, dataclasses.replace(task, life=1, accident=""))
        words = f"goes on from update {after.first}" if after.first is not None else failure(after)
        found.append(f"{size} MB: status {killed.status}; {words}")
    return "; ".join(found)


def damaged(contestant: str, directory: str) -> str:
    """One bit in the middle of the largest file of the newest checkpoint is flipped; then the run is resumed."""
    task = Task(directory, updates=8, samples=64, width=1000, save_every=4)
    run(contestant, task)
    files = [path for path in Path(directory, "run").rglob("*") if path.is_file() and not path.is_symlink()]
    newest = [path for path in files if "8" in str(path.relative_to(directory)) or path.name == "last.ckpt"]
    largest = max(newest, key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[len(contents) // 2] ^= 1 << 6
    for path in {largest, *(path for path in newest if path.name == "last.ckpt")}:
        path.write_bytes(contents)
    after = run(contestant, dataclasses.replace(task, life=1, updates=12))
    said = [line for line in after.said.splitlines() if "damage" in line or "corrupt" in line or "CRC" in line]
    words = f"goes on from update {after.first}" if after.first is not None else failure(after)
    return f"{largest.name}: {words}; {'said: ' + said[0][:200] if said else 'nothing is said of it'}"


def not_a_number(contestant: str, directory: str) -> str:
    """One sample of update 3 gives a loss that is not a number."""
    seen = run(contestant, Task(directory, updates=8, samples=64, nan_sample=9))
    if seen.last is None:
        return failure(seen)
    said = [line for line in seen.said.splitlines() if re.search(r"\bnan\b|n't finite|not finite", line.lower())]
    weights = "finite" if seen.notes[0][-1]["finite"] else "not finite"
    return f"status {seen.status}; the weights are {weights} at the end; said: {said[0][:160] if said else 'nothing'}"


def lost_rank(contestant: str, directory: str, accident: str) -> str:
    """Rank 1 of 2 is killed, or stopped as a machine that hangs is; the contestant's timeout is 10 seconds."""
    task = Task(directory, updates=500, samples=64, accident=accident, accident_update=3, accident_rank=1, timeout=10)
    seen = run(contestant, task, 2)
    named = [line for line in seen.said.splitlines() if "rank 1" in line.lower() or "ranks 1" in line.lower()]
    ended = "not ended" if seen.status is None else f"ended with status {seen.status}"
    return (
        f"{ended} after {seen.seconds:.0f} s; {'said: ' + named[0].strip()[:200] if named else 'rank 1 is not named'}"
    )


def terminated(contestant: str, directory: str) -> str:
    """The process gets SIGTERM after update 6 of a run of 40 that saves each 5; then it is resumed."""
    task = Task(directory, updates=40, samples=64, save_every=5, accident="term", accident_update=6)
    seen = run(contestant, task)
    after = run(contestant, dataclasses.replace(task, life=1, accident=""))
    words = f"goes on from update {after.first}" if after.first is not None else failure(after)
    return f"status {seen.status}, after update {len(seen.notes[0])}; {words}"


Trial = Callable[..., str]

RANDOM = {"dropout": 0.5, "noise": True}

# name -> (trial, its fields, what they mean)
TRIALS: dict[str, tuple[Trial, dict[str, Any], str]] = {
    "accumulated": (accumulated, {}, ""),
    "resumed": (resumed, {"dropout": 0.5}, "With dropout."),
    "resumed, random samples": (resumed, RANDOM, "With dropout; reading a sample draws random numbers."),
    "resumed, random samples, 2 workers": (resumed, {**RANDOM, "workers": 2}, "The same, read by two processes."),
    "resumed, stateful loader": (resumed, {"dropout": 0.5, "stateful_loader": True}, "With dropout, by torchdata."),
    "resumed, 2 ranks": (resumed, {"dropout": 0.5, "world": 2, "world_after": 2}, "With dropout, on two ranks."),
    "resumed, 2 ranks to 1": (resumed, {"world": 2, "world_after": 1}, "Saved by two ranks, resumed on one."),
    "killed in a save": (killed_in_save, {}, ""),
    "damaged": (damaged, {}, ""),
    "terminated": (terminated, {}, ""),
    "not a number": (not_a_number, {}, ""),
    "rank 1 killed": (lost_rank, {"accident": "kill"}, ""),
    "rank 1 stopped": (lost_rank, {"accident": "stop"}, ""),
}
