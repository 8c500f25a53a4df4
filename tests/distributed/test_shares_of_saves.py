"""What each of two ranks writes of a checkpoint, and what it opens of one."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors import safe_open
from stratagem import Callback, TrainModule
from torch import Tensor, nn
from training import make_fit

pytestmark = pytest.mark.slow

FOLDERS = ("model", "optimizer")
opened: Counter[str] = Counter()
hears: list[bool] = []


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str) and "checkpoint-1/" in arguments[0]:
        opened[arguments[0].partition("checkpoint-1/")[2]] += 1


class Layers(TrainModule):
    """Matrices of several sizes, and buffers: one that is small, and one that isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128 * size) for size in (1, 2, 3, 4, 5, 6))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("table", torch.ones(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x).mean() for layer in self.layers) * self.scale.sum() * self.table[0, 0]

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.mean()


class Loaded(Callback):
    """Looks which files were opened until the checkpoint was restored."""

    def __init__(self) -> None:
        self.opened: dict[str, int] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.opened = dict(opened)


def trained(directory: str, strategy: str, resume: str | None = None, **arguments: Any) -> dict[str, int]:
    """A run of an update more: opens of each file of the checkpoint that it went on from."""
    if not hears:  # a hook stays, and so do ranks
        sys.addaudithook(hear)
        hears.append(True)
    opened.clear()
    torch.manual_seed(0)
    loaded = Loaded()
    samples = [{"x": row} for row in torch.randn(8, 128)]
    fit = make_fit(
        Layers(), samples, strategy=strategy, output_dir=directory, max_steps=1 if resume is None else 2,
        per_device_train_batch_size=2, callbacks=[loaded], save_strategy="no" if resume else "steps", save_steps=1,
        **arguments,
    )  # fmt: skip
    fit.train(resume_from_checkpoint=resume)
    return loaded.opened


def shards(path: Path) -> dict[str, list[dict[str, int]]]:
    """By folder, each rank's tensors, with their bytes."""
    found: dict[str, list[dict[str, int]]] = {}
    for folder in FOLDERS:
        for file in sorted((path / folder).iterdir()):
            with safe_open(file, framework="pt") as content:
                found.setdefault(folder, []).append({key: content.get_tensor(key).nbytes for key in content.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_ranks_that_hold_the_same_share_the_writing(ranks: dict[int, Ranks], tmp_path: Path, kind: str) -> None:
    ranks[2].run(trained, directory=str(tmp_path), strategy="ddp", async_save=kind == "async")
    found = shards(tmp_path / "checkpoint-1")
    names = set(dict(Layers().state_dict()))
    first, second = found["model"]
    assert not set(first) & set(second) and {*first, *second} == names
    sizes = [sum(sum(found[folder][rank].values()) for folder in found) for rank in range(2)]
    largest = max(size for held in found["model"] for size in held.values())
    assert abs(sizes[0] - sizes[1]) <= largest
    # Counters of steps, and other small ones, are one rank's, which is the one file that all ranks open for them.
    assert not [name for name in found["optimizer"][1] if name.endswith("/step")]
    assert "scale" in first


def test_a_rank_opens_what_it_needs_and_no_header_besides(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    ranks[2].run(trained, directory=str(tmp_path), strategy="fsdp2")
    path = tmp_path / "checkpoint-1"
    resumed = ranks[2].run(trained, directory=str(tmp_path / "again"), strategy="fsdp2", resume=str(path))
    files = {folder: sorted(f"{folder}/{file.name}" for file in (path / folder).iterdir()) for folder in FOLDERS}
    for rank, counts in enumerate(resumed):
        for folder in FOLDERS:
            own, other = files[folder][rank], files[folder][1 - rank]
            assert counts[own] == 2  # compared with the manifest, which reads the header; then loaded
            # The other's is compared by the other one, and opened for the whole tensors that it has written: the first
            # rank's counters of steps, and a buffer of each.
            assert counts.get(other, 0) == (0 if (rank, folder) == (0, "optimizer") else 1)
    assert sum(counts.get("tensors.json", 0) for counts in resumed) == 2  # compared by one, read by the first
