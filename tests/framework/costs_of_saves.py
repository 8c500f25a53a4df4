"""A program for test_costs_of_saves.py: saves and restores a state of 96 MiB, and counts bytes, opens and memory.

Each of the two is done in a forked process, so that torch is imported once. Prints JSON.
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stratagem.framework.record.recorder  # noqa: F401 (every Fit imports it)
import torch
import torch._dynamo  # the first optimizer imports it
import torch.distributed.checkpoint.state_dict  # the first save does
from stratagem import Fit, TrainModule
from stratagem.framework.callbacks import Callback
from torch import Tensor, nn

MIB = 1 << 20


class Wide(TrainModule):
    """8 parameters of 4 MiB, which with two moments each are 96 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.square().mean()


def kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def passed() -> dict[str, int]:
    """Bytes that this process has read and written through the system."""
    return {
        key: int(value) for key, value in (row.split(": ") for row in Path("/proc/self/io").read_text().splitlines())
    }


opened: Counter[str] = Counter()


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        opened[arguments[0]] += 1


@contextmanager
def counting(directory: Path) -> Iterator[dict[str, Any]]:
    """What is done in here: MiB read, written and at the peak, and opens of each file of checkpoints."""
    gc.collect()
    opened.clear()
    Path("/proc/self/clear_refs").write_text("5")
    resident, before = kibibytes("VmRSS"), passed()
    found: dict[str, Any] = {}
    yield found
    after = passed()
    found["peak"] = (kibibytes("VmHWM") - resident) / 1024
    found["read"], found["written"] = ((after[key] - before[key]) / MIB for key in ("rchar", "wchar"))
    found["opened"] = {
        str(Path(name).relative_to(directory)): count
        for name, count in opened.items()
        if name.startswith(f"{directory}/") and Path(name).is_file()
    }


def make_fit(directory: Path, **options: Any) -> Fit:
    samples = [{"x": row} for row in torch.zeros(8, 1024)]
    given: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "progress": False, "loggers": ()}
    return Fit(Wide(), samples, output_dir=str(directory), report=False, **given | options)


class Saving(Callback):
    """Saves in the middle of a run, twice; each is waited for."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.costs = directory, []

    def on_step_end(self, args: Any, state: Any, control: Any, fit: Fit, **context: Any) -> None:
        with counting(self.directory) as cost:
            fit.save_checkpoint()
            assert fit.saver is not None
            fit.saver.finish()
        self.costs.append(cost)


def save(directory: Path) -> dict[str, Any]:
    costs = {}
    for kind in ("sync", "async"):
        saving = Saving(directory / kind)
        make_fit(directory / kind, save_strategy="no", async_save=kind == "async", callbacks=[saving]).train()
        costs[kind] = saving.costs
    return costs


class Begun(Callback):
    """Ends the counting when the checkpoint is restored."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.block.__exit__(None, None, None)


def restore(directory: Path) -> dict[str, Any]:
    make_fit(directory / "warm", save_strategy="no", max_steps=1).train()  # what a first run imports
    block = counting(directory / "sync")
    fit = make_fit(directory / "out", save_strategy="no", max_steps=2, callbacks=[Begun(block)])
    cost = block.__enter__()
    fit.train(resume_from_checkpoint=directory / "sync" / "checkpoint-2")
    return cost


def without_table(checkpoint: Path) -> None:
    """Make a checkpoint one of an earlier version, which has the headers in its files alone."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["tensors.json"]
    for entry in manifest["files"].values():
        entry.pop("header", None)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "tensors.json").unlink()


def in_child(work: Callable[[Path], dict[str, Any]], directory: Path) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            os.write(writing, json.dumps(work(directory)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(said)


if __name__ == "__main__":
    sys.addaudithook(hear)
    place = Path(sys.argv[1])
    found = {"saved": in_child(save, place), "restored": in_child(restore, place)}
    without_table(place / "sync" / "checkpoint-2")
    print(json.dumps({**found, "earlier": in_child(restore, place)}))
