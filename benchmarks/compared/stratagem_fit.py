"""Contestant: Fit of this repository."""

from typing import Any

from stratagem import Fit, TrainModule
from task import Layers, NotingAdamW, Sentences, Task, mean_loss
from torch import Tensor
from torch.optim import Optimizer

DISTRIBUTION = "stratagem"


class Module(TrainModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layers, self.task = Layers(task), task

    def forward(self, words: Tensor, index: Tensor) -> Tensor:
        return self.layers(words, index)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return mean_loss(outputs, batch["labels"])

    def configure_optimizer(self, args: Any) -> Optimizer:
        return NotingAdamW(self.layers, self.task)


def train(task: Task) -> int:
    """Train, and return the number of the last update."""
    fit = Fit(
        Module(task),
        train_data=Sentences(task),
        strategy="ddp" if task.world > 1 else "single",
        output_dir=task.directory + "/run",
        max_steps=task.updates,
        per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=task.accumulation,
        shuffle=task.shuffle,
        dataloader_num_workers=task.workers,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps" if task.save_every else "no",
        save_steps=task.save_every or 1,
        save_total_limit=task.keep or None,
        hang_timeout=task.timeout or None,
        progress=False,
    )
    return fit.train(resume_from_checkpoint=bool(task.life)).global_step
