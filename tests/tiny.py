"""Small models and data that test files share: ``from tiny import Regressor``."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from stratagem import Callback, Fit, FitArguments, TrainModule
from stratagem.framework.module import IGNORED_LABEL
from stratagem.precision import Precision
from stratagem.strategies import Single
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

OLD_TORCH = not hasattr(Tensor, "grad_dtype")
masters = pytest.mark.skipif(OLD_TORCH, reason="float32 gradients beside 16-bit parameters need torch 2.10")

CLASSES = 7

MakeFit = Callable[..., Fit]
"""The type of conftest.py's make_fit fixture."""


class Float64(Precision):
    """Double precision, so that a tolerance of 1e-12 tells a wrong weight from rounding."""

    name = "64-true"
    parameter_dtype = torch.float64

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.double()


class Elsewhere(Single):
    """One device, whose numbers the host takes for those of an accelerator: it lets flags on the device decide."""

    reads_at_once = False


class Regressor(TrainModule):
    """Two small layers under SGD, of mapping batches with "x" and "y"."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return nn.functional.mse_loss(outputs, batch["y"])

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)


class Tagger(TrainModule):
    """Predicts a class per token under SGD; labels of -100 are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)


class Dropping(TrainModule):
    """Everything whose state a resume could lose: dropout, batch norm's buffers, AdamW's moments, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.relu(self.norm(self.first(x))))
        return self.head(self.third(torch.tanh(self.second(hidden))))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = outputs - batch["y"]
        return {"loss": error.square().mean(), "absolute_error": error.abs().mean()}


def lines_of(log: Path) -> list[dict[str, Any]]:
    """The beginnings and the numbers in a log.jsonl, without what is another in each run: times and memory."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time" and not name.startswith("memory_")}
        for line in lines
        if line.get("event") in (None, "begin", "resume")
    ]


def regression_rows(count: int, features: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Rows of "x" and "y"; the same for the same arguments."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, features, generator=generator, dtype=dtype)
    noise = torch.randn(count, 1, generator=generator, dtype=dtype)
    y = x.sum(dim=1, keepdim=True).sin() + 0.1 * noise
    return [{"x": x[i], "y": y[i]} for i in range(count)]


def token_rows(count: int, length: int = 6) -> list[dict[str, Tensor]]:
    """Rows of "tokens" and "labels"; row i has i % (length + 1) labels that count, the others are padding."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for i in range(count):
        tokens = torch.randint(CLASSES, (length,), generator=generator)
        labels = torch.randint(CLASSES, (length,), generator=generator)
        labels[i % (length + 1) :] = IGNORED_LABEL
        rows.append({"tokens": tokens, "labels": labels})
    return rows


class Numbers(Dataset):
    """Samples 0 to count - 1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class NumberStream(IterableDataset):
    """Samples 0 to count - 1, one after another, without a length; workers take turns."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(self.count) if info is None else range(info.id, self.count, info.num_workers))


class NoisyRows(Dataset):
    """Regression rows, to which ``__getitem__`` adds random numbers of all three generators."""

    def __init__(self, count: int) -> None:
        self.rows = regression_rows(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        noise = torch.randn(3) + random.random() + float(numpy.random.rand())
        return {"x": row["x"] + 0.1 * noise, "y": row["y"]}


class RowStream(IterableDataset):
    """An iterable dataset over rows; workers take turns, and it may shuffle with the global random state."""

    def __init__(self, rows: list[Any], shuffle: bool = False) -> None:
        self.rows = rows
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.rows)).tolist() if self.shuffle else list(range(len(self.rows)))
        info = get_worker_info()
        for index in order if info is None else order[info.id :: info.num_workers]:
            yield self.rows[index]


class StopAt(Callback):
    """Stops training after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, to be compared later."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def logs_of(fit: Fit) -> list[dict[str, Any]]:
    """The logs of a run, without its totals."""
    return [line for line in fit.state.log_history if "train_runtime" not in line]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch from rows, as the hand-written loops make it."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
