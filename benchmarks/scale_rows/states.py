"""States that rows save and restore: a module of matrices after an update by AdamW."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import Fit, TrainModule
from ...framework.callbacks import Callback
from .measuring import measuring


class Matrices(TrainModule):
    """Square matrices.

    Args:
        count: of them.
        width: of each.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ParameterList(torch.ones(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer.sum() for layer in self.layers]).sum() * x.sum()

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs


class Saving(Callback):
    """Measures a save in the middle of a run, to the end of its writing.

    Args:
        pieces: that the time is divided by.
    """

    def __init__(self, pieces: int = 1) -> None:
        self.pieces = pieces

    def on_step_end(self, args, state, control, fit, **kwargs):  # type: ignore[no-untyped-def]
        with measuring(self.pieces) as self.figures:
            fit.save_checkpoint()
            fit.saver.finish()


@contextmanager
def directory() -> Iterator[Path]:
    """A directory on the disk of the working directory: /tmp may be memory."""
    made = tempfile.mkdtemp(dir=Path.cwd())
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made)


def fit_in(path: Path, module: TrainModule, **options: Any) -> Fit:
    """A Fit of one update that saves only where it is told to."""
    given = {"max_steps": 1, "save_strategy": "no", "progress": False, "loggers": (), "report": False}
    return Fit(module, [{"x": torch.zeros(1)}], output_dir=str(path), **{**given, **options})


def save_by_fit(count: int, width: int, pieces: int = 1, **options: Any) -> dict[str, float]:
    """Measure ``fit.save_checkpoint()``; a small one before has imported what a first save does."""
    with directory() as path:
        fit_in(path / "before", Matrices(1, 8), callbacks=[Saving()], **options).train()
        saving = Saving(pieces)
        fit_in(path / "run", Matrices(count, width), callbacks=[saving], **options).train()
    return saving.figures


def state(count: int, width: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """Make a module and its optimizer after an update, and all their tensors by name."""
    module = Matrices(count, width)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.zeros(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return module, optimizer, tensors


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
