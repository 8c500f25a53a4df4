"""What every contestant trains: a small network on padded labels, and an optimizer that notes what it is given.

A task is a few numbers in a file, so that a rank, a resumed run and another framework are each a process of their own.
Nothing in here knows a framework: that a contestant takes part is a file with one function, ``train(task)``.
"""

import dataclasses
import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset

WORDS, LENGTH, IGNORED = 32, 12, -100


@dataclasses.dataclass(frozen=True)
class Task:
    """One process's part of a trial.

    Attributes:
        directory: where the run, its checkpoints and its notes lie.
        life: 0 for the first start, 1 for the one that resumes.
        updates: at which the run ends, counted from its beginning.
        samples: length of the data.
        micro_batch: samples in a forward pass of one rank.
        accumulation: forward passes in an update.
        save_every: updates from one checkpoint to the next; 0 saves nothing.
        keep: checkpoints that stay; 0 keeps all.
        shuffle: whether samples come in a random order.
        workers: processes that load data.
        width: of the hidden layer, by which the size of a checkpoint is chosen.
        dropout: probability; 0 for none.
        noise: whether reading a sample draws random numbers, as an augmentation does.
        nan_sample: a sample whose loss is not a number; -1 for none.
        accident: what happens to a rank, see ``ACCIDENTS``; "" for nothing.
        accident_update: in which update of this process, counted from 1.
        accident_rank: to which rank.
        file_bytes: the accident "file_limit": the kernel kills the process in the write that makes a file longer.
        timeout: seconds that ranks may wait for one another, given to whatever setting the contestant has for it.
        whole_loss: use the contestant's own way to a loss that divides by the items of the whole update, if it has one.
        stateful_loader: read by torchdata's StatefulDataLoader, where the contestant asks for one that can be resumed.
    """

    directory: str
    life: int = 0
    updates: int = 3
    samples: int = 40
    micro_batch: int = 4
    accumulation: int = 1
    save_every: int = 0
    keep: int = 0
    shuffle: bool = False
    workers: int = 0
    width: int = 24
    dropout: float = 0.0
    noise: bool = False
    nan_sample: int = -1
    accident: str = ""
    accident_update: int = 0
    accident_rank: int = 0
    file_bytes: int = 0
    timeout: float = 0.0
    whole_loss: bool = True
    stateful_loader: bool = False

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    @property
    def world(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def notes(self) -> Path:
        """This rank's notes of this life, one JSON object for each update."""
        return Path(self.directory, f"notes-{self.life}-{self.rank}.jsonl")


class Sentences(Dataset):
    """Random words, each sample with labels for a different share of them: from two to all."""

    def __init__(self, task: Task) -> None:
        generator = torch.Generator().manual_seed(1)
        self.noise = task.noise
        self.words = torch.randint(0, WORDS, (task.samples, LENGTH), generator=generator)
        self.labels = torch.randint(0, WORDS, (task.samples, LENGTH), generator=generator)
        for number, row in enumerate(self.labels):
            row[2 + number * 7 % (LENGTH - 1) :] = IGNORED

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        words = self.words[index]
        if self.noise:
            words = torch.where(torch.rand(LENGTH) < 0.2, torch.randint(0, WORDS, (LENGTH,)), words)
        return {"words": words, "labels": self.labels[index], "index": torch.tensor(index)}


class Layers(nn.Module):
    """Two layers with dropout between them; notes which samples it was given."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, task.width)
        self.hidden = nn.Linear(task.width, task.width)
        self.head = nn.Linear(task.width, WORDS)
        self.dropout, self.nan_sample = task.dropout, task.nan_sample
        self.seen: list[int] = []
        torch.manual_seed(2)  # whatever is drawn from here on is dropout's and the data's

    def forward(self, words: Tensor, index: Tensor) -> Tensor:
        if self.training:
            self.seen += index.tolist()
        hidden = nn.functional.gelu(self.hidden(self.embedding(words)))
        logits = self.head(nn.functional.dropout(hidden, self.dropout, self.training))
        if self.nan_sample in index.tolist():
            logits = logits * float("nan")
        return logits


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels that count, as every example of a language model has it."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class NotingAdamW(AdamW):
    """AdamW that writes down each update: the samples, the gradient, a hash of the weights; and meets the accident."""

    def __init__(self, layers: Layers, task: Task) -> None:
        super().__init__(layers.parameters(), lr=1e-2)
        self.layers, self.task, self.count = layers, task, 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:  # Lightning's forward and backward
            with torch.enable_grad():
                loss = closure()
        if not self.layers.seen:  # torch makes an optimizer's state by a step without gradients, to load into it
            super().step()
            return loss
        gradients = [p.grad for p in self.layers.parameters() if p.grad is not None]
        note: dict[str, Any] = {"samples": self.layers.seen[:], "time": time.time(), "process": os.getpid()}
        if self.task.width < 100:
            note["gradient"] = torch.cat([g.flatten() for g in gradients]).tolist()
        super().step()
        digest = hashlib.sha256()
        for parameter in self.layers.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        note["weights"] = digest.hexdigest()
        note["finite"] = all(bool(p.isfinite().all()) for p in self.layers.parameters())
        self.layers.seen.clear()
        self.count += 1
        with self.task.notes.open("a") as file:
            file.write(json.dumps(note) + "\n")
        if self.task.accident and (self.count, self.task.rank) == (self.task.accident_update, self.task.accident_rank):
            ACCIDENTS[self.task.accident](self.task)
        if self.task.accident == "term" and self.count >= self.task.accident_update:
            time.sleep(0.5)  # updates that are long enough for whoever waits a moment before it saves
        return loss


def limit_files(task: Task) -> None:
    """From now on the kernel kills this process in the write that makes any file longer, as SIGKILL would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (task.file_bytes, resource.RLIM_INFINITY))


ACCIDENTS: dict[str, Callable[[Task], None]] = {
    "kill": lambda task: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda task: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda task: os.kill(os.getpid(), signal.SIGTERM),
    "file_limit": limit_files,
}


def whole_gradients(task: Task, size: int) -> Iterator[Tensor]:
    """What each update's gradient is by definition: that of one mean over all labels of its samples, in one batch.

    Each is taken at the weights that AdamW reaches by the ones before it.

    Args:
        size: samples in an update; the last may have fewer.
    """
    layers, data = Layers(task), Sentences(task)
    optimizer = AdamW(layers.parameters(), lr=1e-2)
    for first in range(0, task.samples, size):
        rows = [data[index] for index in range(first, min(first + size, task.samples))]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        optimizer.zero_grad()
        mean_loss(layers(batch["words"], batch["index"]), batch["labels"]).backward()
        yield torch.cat([p.grad.flatten() for p in layers.parameters() if p.grad is not None])
        optimizer.step()
