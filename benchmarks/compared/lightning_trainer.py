"""Contestant: Lightning's Trainer."""

from datetime import timedelta

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from task import Layers, NotingAdamW, Sentences, Task, mean_loss
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

DISTRIBUTION = "lightning"


class Module(pl.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layers, self.task = Layers(task), task

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        return mean_loss(self.layers(batch["words"], batch["index"]), batch["labels"])

    def configure_optimizers(self) -> Optimizer:
        return NotingAdamW(self.layers, self.task)


def train(task: Task) -> int:
    """Train, and return the number of the last update."""
    callbacks = []
    if task.save_every:
        callbacks.append(
            ModelCheckpoint(
                task.directory + "/run",
                every_n_train_steps=task.save_every,
                save_top_k=task.keep or -1,
                monitor="step" if task.keep else None,
                mode="max",
                save_last=True,
            )
        )
    seconds = task.timeout or 1800
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=task.world,
        strategy=DDPStrategy(timeout=timedelta(seconds=seconds)) if task.world > 1 else "auto",
        max_steps=task.updates,
        accumulate_grad_batches=task.accumulation,
        logger=False,
        callbacks=callbacks,
        default_root_dir=task.directory,
        enable_checkpointing=bool(task.save_every),
        use_distributed_sampler=task.shuffle,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Sentences(task)
    # On several ranks its own sampler shuffles; the trials without shuffling bring theirs.
    split = task.world > 1 and not task.shuffle
    sampler: Sampler[int] | None = None
    if split:
        sampler = DistributedSampler(data, task.world, task.rank, shuffle=False)
    kind = StatefulDataLoader if task.stateful_loader else DataLoader
    loader = kind(data, task.micro_batch, task.shuffle, sampler, num_workers=task.workers)
    trainer.fit(Module(task), loader, ckpt_path="last" if task.life else None)
    return trainer.global_step
