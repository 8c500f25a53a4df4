"""A program for test_two_processes.py: two real processes in one output_dir, one of them stopped, killed or ending.

``cases`` has a first process stop itself before it publishes a checkpoint, and looks what a second one may do.
``claims`` kills a run before each file operation with which it makes a used directory its own, and looks what the next
start finds. Children are forked, so that torch is imported once. Prints JSON.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from killed_saves import Gate, finish, in_child, kill, make_fit, whole_checkpoints
from stratagem import Callback
from stratagem.framework.checkpoint import locking
from stratagem.framework.checkpoint.line import read_marker
from stratagem.framework.checkpoint.verifying import verify
from tiny import StopAt

SAVE_OF_4 = "os.rename checkpoint-4.partial"


class StopBefore(Gate):
    """Stops its process, as SIGSTOP does, before a file operation; SIGCONT lets it go on."""

    def __init__(self, directory: Path, operation: str) -> None:
        self.operation = operation
        super().__init__(directory, 0, None, -1)
        self.is_open = False

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        pass

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and f"{event} {Path(str(arguments[0])).name}" == self.operation:
            self.operation = ""
            os.kill(os.getpid(), signal.SIGSTOP)


def outcome(directory: Path, work: Callable[[], Any]) -> dict[str, Any]:
    """Do something in a child: what it gave or raised, and what it wrote to stderr."""

    def in_it(report: int) -> None:
        errors = os.open(directory.parent / "errors.txt", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        try:
            told: dict[str, Any] = {"gave": work()}
        except Exception as error:
            told = {"raised": f"{type(error).__name__}: {error}"}
        sys.stderr.flush()
        os.write(report, json.dumps(told).encode())

    told = json.loads(finish(*in_child(in_it)))
    return {**told, "said": (directory.parent / "errors.txt").read_text()}


def begin_and_stop(directory: Path, **more: Any) -> tuple[int, int]:
    """A process that trains to update 6 and stops itself inside the save of checkpoint-4."""

    def work(report: int) -> None:
        gate = StopBefore(directory, SAVE_OF_4)
        fit = make_fit(directory, max_steps=6, callbacks=[gate], **more)
        os.write(report, f"{fit.train(resume_from_checkpoint=True).global_step}".encode())

    child, reading = in_child(work)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    return child, reading


def train(directory: Path, resume: Any = True, **more: Any) -> Callable[[], int]:
    return lambda: make_fit(directory, **more).train(resume_from_checkpoint=resume).global_step


def cases(root: Path) -> None:
    """Print what the second process was told in each case."""
    results: dict[str, Any] = {}
    directory = root / "refused" / "run"
    first, reading = begin_and_stop(directory)
    locking.PATIENCE = 0.2
    results["first"] = {"pid": first, "run": read_marker(directory).line.id}  # type: ignore[union-attr]
    results["resumes"] = outcome(directory, train(directory))
    results["begins anew"] = outcome(directory, train(directory, resume=None))
    results["goes back"] = outcome(directory, train(directory, resume=directory / "checkpoint-2"))
    results["only reads"] = outcome(directory, train(directory, save_strategy="no"))

    def save_by_hand() -> None:
        fit = make_fit(directory, save_strategy="no")
        fit.train()
        fit.save_checkpoint()

    results["saves by hand"] = outcome(directory, save_by_hand)
    results["left"] = sorted(path.name for path in directory.iterdir())
    os.kill(first, signal.SIGCONT)
    results["first"]["ended at"] = finish(first, reading)
    results["first"]["left"] = whole_checkpoints(directory)
    results["after it"] = outcome(directory, train(directory, max_steps=8))

    locking.PATIENCE = 5.0
    directory = root / "killed" / "run"
    first, reading = begin_and_stop(directory)
    kill(first, reading)
    results["killed"] = outcome(directory, train(directory, max_steps=6)) | {"left": whole_checkpoints(directory)}

    directory = root / "orphaned" / "run"
    first, reading = in_child(lambda report: fork_and_stop(directory))
    os.waitpid(first, os.WUNTRACED)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    worker = int((directory / "worker").read_text())
    os.kill(worker, 0)  # it lives
    results["its worker lives"] = outcome(directory, train(directory))
    os.kill(worker, signal.SIGKILL)
    os.close(reading)

    directory = root / "ending" / "run"
    first, reading = begin_and_stop(directory)
    slow, waiting = in_child(lambda report: os.write(report, str(train(directory, max_steps=8)()).encode()) and None)
    time.sleep(1.0)
    os.kill(first, signal.SIGCONT)  # it ends while the second waits
    finish(first, reading)
    results["waits for its end"] = {"gave": int(finish(slow, waiting)), "left": whole_checkpoints(directory)}
    print(json.dumps(results))


class Fork(Callback):
    """A child that sleeps, as one that loads data would when its parent is killed, and then its own process stopped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(60.0)
            os._exit(0)
        (self.directory / "worker").write_text(str(child))
        os.kill(os.getpid(), signal.SIGSTOP)


def fork_and_stop(directory: Path) -> None:
    make_fit(directory, callbacks=[Fork(directory)]).train()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def claims(root: Path, stride: int) -> None:
    """Kill a run that begins anew, or goes back to checkpoint-2, before each file operation until its first update."""
    start = root / "start"
    finish(*in_child(lambda report: make_fit(start, 6, callbacks=[StopAt(6)]).train() and None))
    old = read_marker(start)
    assert old is not None
    results = []
    for way in ("begins anew", "goes back"):

        def run(directory: Path, block_at: int | None, way: str = way) -> tuple[int, int]:
            def work(report: int) -> None:
                gate = Gate(directory, 99, block_at, report)
                resume = directory / "checkpoint-2" if way == "goes back" else None
                fit = make_fit(directory, 6, callbacks=[gate, ends], save_steps=1, save_total_limit=1)
                ends.gate, gate.is_open = gate, False
                with contextlib.suppress(Interrupted):
                    fit.train(resume_from_checkpoint=resume)
                os.write(report, json.dumps(gate.operations).encode())

            ends = End()
            shutil.copytree(start, directory)
            return in_child(work)

        operations = json.loads(finish(*run(root / f"counted {way}", None)))
        for point in range(0, len(operations), stride):
            directory = root / f"{way} {point}"
            child, reading = run(directory, point)
            assert os.read(reading, 4) == b"here", f"{operations[point]} was not reached"
            kill(child, reading)
            marker = read_marker(directory)
            assert marker is not None
            told = outcome(directory, train(directory, max_steps=7, save_steps=1, save_total_limit=1))
            for name in names(directory):
                verify(directory / name)
            results.append(
                {
                    "way": way,
                    "before": operations[point],
                    "is claimed": marker.line != old.line,
                    "left": names(directory),
                    "parent": [until for _, until in marker.line.ancestors],
                    **told,
                }
            )
    print(json.dumps(results))


class Interrupted(Exception):
    """Training is to end here."""


class End(Callback):
    """Ends training before its first update, and with it what the gate hears."""

    gate: Gate | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        assert self.gate is not None
        self.gate.is_open = True
        raise Interrupted


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "cases":
        cases(Path(sys.argv[2]))
    else:
        claims(Path(sys.argv[2]), int(sys.argv[3]))
