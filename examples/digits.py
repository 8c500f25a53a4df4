"""A small convolutional network that reads handwritten digits, with accuracy by torchmetrics. Takes seconds.

    python examples/digits.py           # needs scikit-learn, for its bundled images, and torchmetrics
    python examples/digits.py --help    # every option of the run

It ends with the accuracy on images it never saw.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from stratagem import Fit, TrainModule, configure
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class DigitReader(TrainModule):
    """Two convolutions, and a linear layer over the 4 x 4 cells that pooling leaves of an 8 x 8 image."""

    item_name = "images"

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(2 * width * 4 * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def metrics(self) -> Mapping[str, Any]:
        return {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}


def build(width: int = 32) -> DigitReader:
    """The model, for tools that train, time or export it.

    Args:
        width: channels of the first convolution; the second has twice as many.
    """
    return DigitReader(width)


def data(split: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out images with their digits: 1,797 in all, a fifth of them held out, alike in digits.

    Args:
        split: a seed: another one holds out other images.
    """
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, digits, test_size=0.2, random_state=split, stratify=digits)
    train_images, held_out_images = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    train_digits, held_out_digits = (torch.tensor(part) for part in parts[2:])
    return TensorDataset(train_images, train_digits), TensorDataset(held_out_images, held_out_digits)


ARGUMENTS = {
    "output_dir": "output/digits",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "learning_rate": 3e-3,
    "logging_strategy": "epoch",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "seed": 0,
}
"""What Fit is given, unless the command line or a file says otherwise."""


def main() -> None:
    """Train and evaluate."""
    run = configure(build, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    accuracy = fit.evaluate()["eval_accuracy"]
    if fit.strategy.is_main:
        print(f"held-out accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    main()
