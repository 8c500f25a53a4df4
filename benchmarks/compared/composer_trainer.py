"""Contestant: Composer's Trainer."""

import os
from typing import Any

import torch
from composer import ComposerModel, DataSpec, Trainer
from composer.utils import dist
from task import IGNORED, Layers, NotingAdamW, Sentences, Task, mean_loss
from torch import Tensor
from torch.utils.data import DataLoader

DISTRIBUTION = "mosaicml"


class Module(ComposerModel):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layers = Layers(task)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layers(batch["words"], batch["index"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], *arguments: Any, **others: Any) -> Tensor:
        return mean_loss(outputs, batch["labels"])


def labels_in(batch: dict[str, Tensor]) -> int:
    """By which its documented ``accumulate_train_batch_on_tokens`` weighs micro-batches and ranks."""
    return int((batch["labels"] != IGNORED).sum())


def train(task: Task) -> int:
    """Train, and return the number of the last update."""
    os.environ.setdefault("NODE_RANK", "0")  # its own launcher sets what torchrun calls otherwise
    dist.initialize_dist("cpu", task.timeout or 300.0)
    data, module = Sentences(task), Module(task)
    loader: DataLoader[Any] = DataLoader(
        data,
        task.micro_batch * task.accumulation,
        sampler=dist.get_sampler(data, shuffle=task.shuffle),
        num_workers=task.workers,
    )
    trainer = Trainer(
        model=module,
        train_dataloader=DataSpec(loader, get_num_tokens_in_batch=labels_in),
        optimizers=NotingAdamW(module.layers, task),
        max_duration=f"{task.updates}ba",
        device="cpu",
        device_train_microbatch_size=task.micro_batch,
        accumulate_train_batch_on_tokens=task.whole_loss,
        run_name="run",
        save_folder=task.directory + "/run" if task.save_every else None,
        save_interval=f"{task.save_every or 1}ba",
        save_num_checkpoints_to_keep=task.keep or -1,
        autoresume=bool(task.save_every),
        save_overwrite=True,  # as in the example of its documentation; without it, what a killed save left is refused
        dist_timeout=task.timeout or 300.0,
        progress_bar=False,
        seed=0,
    )
    torch.manual_seed(2)
    trainer.fit()
    return int(trainer.state.timestamp.batch)
