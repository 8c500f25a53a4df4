"""Contestant: the Trainer of transformers, with the accelerate beneath it."""

from typing import Any

from task import Layers, NotingAdamW, Sentences, Task, mean_loss, summed_loss
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

DISTRIBUTION = "transformers"


class Module(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layers = Layers(task)

    def forward(self, words: Tensor, index: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(words, index)
        return {"logits": logits} if labels is None else {"loss": mean_loss(logits, labels), "logits": logits}


def whole_loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Its documented way to one mean over an update: ``compute_loss_func`` is told how many labels there are."""
    return summed_loss(outputs["logits"], labels) / num_items_in_batch


def train(task: Task) -> int:
    """Train, and return the number of the last update."""
    module = Module(task)
    optimizer = NotingAdamW(module.layers, task)
    trainer = Trainer(
        module,
        TrainingArguments(
            output_dir=task.directory + "/run",
            max_steps=task.updates,
            per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=task.accumulation,
            train_sampling_strategy="random" if task.shuffle else "sequential",
            dataloader_num_workers=task.workers,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="steps" if task.save_every else "no",
            save_steps=task.save_every or 1,
            save_total_limit=task.keep or None,
            ddp_timeout=int(task.timeout) or 1800,
            enable_jit_checkpoint=task.accident == "term",
            report_to="none",
            use_cpu=not task.timeout,  # with it, ddp_timeout is not passed on
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        data_collator=default_collate,
        train_dataset=Sentences(task),
        optimizers=(optimizer, LambdaLR(optimizer, lambda update: 1.0)),
        compute_loss_func=whole_loss if task.whole_loss else None,
    )
    return trainer.train(resume_from_checkpoint=bool(task.life)).global_step
