"""A program for test_killed_saves.py: saves checkpoints in processes of their own, kills them, and looks what is left.

Every child is forked, so that torch is imported once. ``sweep`` blocks a child before its n-th file operation below the
run's directory and kills it there, for every n; ``at_random`` kills children that save all the time. Prints JSON.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stratagem.framework.record.recorder  # noqa: F401 (every Fit imports it, and would do so in each child)
import torch
import torch._dynamo  # every optimizer imports it, which takes a second and would do so in each child
from stratagem import Callback, Fit
from stratagem.framework.checkpoint.directory import HISTORY
from tiny import Dropping, StopAt, regression_rows

FILE_OPERATIONS = ("open", "os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Gate(Callback):
    """From an update on, counts file operations below a directory, and blocks for good before the n-th."""

    def __init__(self, directory: Path, from_update: int, block_at: int | None, report: int) -> None:
        self.directory = str(directory)
        self.from_update = from_update
        self.block_at = block_at
        self.report = report
        self.operations: list[str] = []
        self.is_open = True
        sys.addaudithook(self.hear)

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.is_open = state.global_step < self.from_update

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_open or event not in FILE_OPERATIONS:
            return
        # shutil.rmtree names files relative to a directory it holds open.
        path = str(arguments[0])
        if not path.startswith(self.directory) and event == "open":
            return
        self.operations.append(f"{event} {Path(path).name}")
        if len(self.operations) - 1 == self.block_at:
            os.write(self.report, b"here")
            while True:
                time.sleep(60)


def make_fit(directory: Path, max_steps: int = 4, **more: Any) -> Fit:
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "loggers": (),
        "progress": False,
        "report": False,
    }
    return Fit(Dropping(), regression_rows(22), max_steps=max_steps, output_dir=str(directory), **{**options, **more})


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Do something in a forked process, which is given the writing end of a pipe: (its id, the reading end)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            work(writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    return child, reading


def finish(child: int, reading: int) -> str:
    """Wait for a child to end well; what it wrote."""
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"the child failed after saying {said!r}"
    return said


def kill(child: int, reading: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)


def whole_checkpoints(directory: Path) -> list[int]:
    """Updates of the checkpoints that have their name; each must agree with its manifest in every byte."""
    steps = []
    for path in directory.glob("checkpoint-*"):
        if not path.name.removeprefix("checkpoint-").isdigit():
            continue
        files = json.loads((path / "manifest.json").read_text())["files"]
        present = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - {"manifest.json", HISTORY}
        assert present == set(files), f"{path}: {present} is not {set(files)}"
        for name, entry in files.items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == entry["sha256"], f"{path / name}"
        steps.append(int(path.name.removeprefix("checkpoint-")))
    return sorted(steps)


def end_of(directory: Path, **more: Any) -> str:
    """Resume to update 4 in a child: the updates it did again, and a hash of its final weights."""

    def work(report: int) -> None:
        fit = make_fit(directory, **more)
        fit.train(resume_from_checkpoint=True)
        digest = hashlib.sha256()
        for tensor in fit.module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        os.write(report, f"{fit.state.global_step} {digest.hexdigest()}".encode())

    return finish(*in_child(work))


def sweep(root: Path, before: int, stride: int) -> None:
    """Kill the save of checkpoint-4 before each of its file operations.

    Args:
        root: to work in.
        before: update of the checkpoint that is there already: 2, or 4 itself, which is then saved again.
        stride: only every so many operations.
    """
    unbroken = end_of(root / "unbroken")
    start = root / "start"
    finish(*in_child(lambda report: make_fit(start, callbacks=[StopAt(before)]).train()))  # type: ignore[arg-type]
    assert whole_checkpoints(start) == ([2] if before == 2 else [2, 4])
    if before == 4:
        shutil.rmtree(start / "checkpoint-2")  # so that nothing stands in for the one that is saved again

    def save(directory: Path, block_at: int | None) -> tuple[int, int]:
        def work(report: int) -> None:
            gate = Gate(directory, 4 if before == 2 else 0, block_at, report)
            fit = make_fit(directory, callbacks=[gate], save_total_limit=1)
            fit.train(resume_from_checkpoint=True)
            if before == 4:
                gate.is_open = False
                fit.save_checkpoint()
            gate.is_open = True
            os.write(report, json.dumps(gate.operations).encode())

        shutil.copytree(start, directory)
        return in_child(work)

    operations = json.loads(finish(*save(root / "counted", None)))
    left = []
    for point in range(0, len(operations), stride):
        directory = root / f"killed-{point}"
        child, reading = save(directory, point)
        assert os.read(reading, 4) == b"here", f"{operations[point]} was not reached"
        kill(child, reading)
        found = whole_checkpoints(directory)
        end = end_of(directory)
        left.append({"before": operations[point], "left": found, "end": end == unbroken, "after": end})
        assert whole_checkpoints(directory)[-1] == 4 and not list(directory.glob("*.partial"))
        shutil.rmtree(directory)
    print(json.dumps({"operations": operations, "kills": left, "unbroken": unbroken}))


def at_random(root: Path, kills: int) -> None:
    """Kill a run that saves after every update, at moments drawn anew each time, and resume it where it was killed."""
    directory, draws = root / "run", random.Random(3)
    steps = []
    for _ in range(kills):
        child, reading = in_child(
            lambda report: make_fit(directory, max_steps=10**6, save_steps=1, save_total_limit=3).train(
                resume_from_checkpoint=True
            )
        )
        time.sleep(draws.uniform(0.05, 0.8))
        kill(child, reading)
        steps.append(whole_checkpoints(directory))
    last = max(steps[-1])
    done = end_of(directory, max_steps=last + 1, save_steps=1, lr_scheduler_type="constant")
    print(json.dumps({"steps": steps, "last": last, "done": done}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "sweep":
        sweep(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        at_random(Path(sys.argv[2]), int(sys.argv[3]))
