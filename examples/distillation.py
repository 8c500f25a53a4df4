"""A small reader of digits learns from a large one, which is frozen and computes in bfloat16. Takes seconds.

    python examples/distillation.py                                # needs scikit-learn and torchmetrics
    python examples/distillation.py --strategy fsdp2 --devices 2   # both are sharded over two ranks
    python examples/distillation.py --help                         # every option of the run

It ends with the accuracies of teacher, student and the student's averaged weights on images none of them saw.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from digits import DigitReader, data
from stratagem import Average, Fit, TrainModule, configure, frozen
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy


class Distilled(TrainModule):
    """A student that is to give each image the probabilities that its teacher gives (Hinton et al., 2015).

    Args:
        student, teacher: modules of images to logits.
        temperature: by which logits are divided, so that small probabilities count.
        labels: the weight of the images' own digits beside the teacher's answers.
    """

    item_name = "images"

    def __init__(
        self, student: torch.nn.Module, teacher: torch.nn.Module, temperature: float = 4.0, labels: float = 0.1
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = frozen(teacher, precision="bf16-true", saved="once")
        self.temperature, self.labels = temperature, labels

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, digits = batch
        taught = F.log_softmax(self.teacher(images) / self.temperature, dim=1)
        answers = F.log_softmax(outputs / self.temperature, dim=1)
        distance = F.kl_div(answers, taught, reduction="batchmean", log_target=True) * self.temperature**2
        wrong = F.cross_entropy(outputs, digits)
        return {"loss": (1 - self.labels) * distance + self.labels * wrong, "distance": distance}

    def metrics(self) -> Mapping[str, Any]:
        return {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}


def make_teacher(epochs: int = 6) -> DigitReader:
    """Train a large reader with nothing but torch, the same one on every rank. A real teacher is read from a file."""
    torch.manual_seed(0)
    teacher, (images, digits) = DigitReader(32), data()[0].tensors
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(32):
            F.cross_entropy(teacher(images[part]), digits[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return teacher


def build(width: int = 4) -> Distilled:
    """The student with its teacher.

    Args:
        width: channels of the student's first convolution; the teacher has 32.
    """
    teacher = make_teacher()
    torch.manual_seed(0)
    return Distilled(DigitReader(width), teacher)


ARGUMENTS = {
    "output_dir": "output/distillation",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "parameter_options": {"student.layers.0.*": {"learning_rate_scale": 0.5}},
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "seed": 0,
}
"""What Fit is given, unless the command line or a file says otherwise."""


def main() -> None:
    """Distil and evaluate."""
    run, average = configure(build, data, ARGUMENTS), Average(decay=0.98)
    fit = Fit.from_config(run, callbacks=[average])
    fit.train(resume_from_checkpoint=run.resume)
    found = {"student": fit.evaluate(), "its average": fit.evaluate(weights=average)}
    images, digits = data()[1].tensors
    if fit.strategy.is_main:
        right = make_teacher().eval()(images).argmax(1) == digits
        print(f"teacher: held-out accuracy {right.float().mean():.4f}")
        for name, metrics in found.items():
            print(f"{name}: held-out accuracy {metrics['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
