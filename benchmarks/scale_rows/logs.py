"""Row: what a save does beside its tensors after many logs, and what it leaves in state.json."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import Fit, TrainModule
from .measuring import measuring

TITLE = "A save of a small model after 300,000 logs, of which 50 are new"
ROUNDS = 3
LIMIT = "stratagem, after 50 logs"
LOGS, NEW = 300_000, 50
FILE = "state.json MB"


class Small(TrainModule):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.square().mean()


def entries(count: int) -> list[dict[str, Any]]:
    """So many logs, as a run makes them."""
    return [
        {"loss": 2.0 / (step + 1), "grad_norm": step / 7, "learning_rate": 1e-4, "epoch": step / 1e3, "step": step}
        for step in range(count)
    ]


def stratagem(logs: int = LOGS) -> dict[str, float]:
    """A save, after one that has written all the others."""
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {
            "report": False,
            "progress": False,
            "loggers": (),
            "save_strategy": "no",
            "output_dir": directory,
        }
        fit = Fit(Small(), [{"x": row} for row in torch.randn(8, 4)], max_steps=1, **options)
        fit.train()
        fit.state.log_history.extend(entries(logs))
        fit.save_checkpoint()
        fit.state.log_history.extend(entries(NEW))
        with measuring() as figures:
            path = fit.save_checkpoint()
        return {**figures, FILE: (path / "state.json").stat().st_size / 1e6}


def few() -> dict[str, float]:
    """The same save, with nothing but the new logs."""
    return stratagem(NEW)


def in_one_file() -> dict[str, float]:
    """What earlier versions, and peers, do beside tensors: all logs as one JSON text, flushed."""
    history = entries(LOGS + NEW)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "state.json")
        with measuring() as figures, path.open("w") as file:
            file.write(json.dumps({"log_history": history}))
            file.flush()
            os.fsync(file.fileno())
        return {**figures, FILE: path.stat().st_size / 1e6}


def transformers_state() -> dict[str, float]:
    """transformers' trainer_state.json."""
    from transformers import TrainerState

    state = TrainerState(log_history=entries(LOGS + NEW))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trainer_state.json")
        with measuring() as figures:
            state.save_to_json(str(path))
        return {**figures, FILE: path.stat().st_size / 1e6}


CONTESTANTS = {
    "stratagem": stratagem,
    "stratagem, after 50 logs": few,
    "all logs in state.json, alone": in_one_file,
    "transformers' trainer_state.json, alone": transformers_state,
}
