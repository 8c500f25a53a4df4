"""A small convolutional network that reads handwritten digits, with accuracy by torchmetrics. Takes seconds.

    python examples/digits.py           # needs scikit-learn, for its bundled images, and torchmetrics

It ends with the accuracy on images it never saw.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from stratagem import Fit, TrainModule
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


def build() -> DigitReader:
    """The model at its default size, for tools that train, time or export it."""
    return DigitReader()


def datasets(seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out images with their digits: 1,797 in all, a fifth of them held out, alike in digits."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, digits, test_size=0.2, random_state=seed, stratify=digits)
    train_images, held_out_images = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    train_digits, held_out_digits = (torch.tensor(part) for part in parts[2:])
    return TensorDataset(train_images, train_digits), TensorDataset(held_out_images, held_out_digits)


def parse_options() -> argparse.Namespace:
    """Every option of the run, from the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small CNN on handwritten digits.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of the schedule")
    parser.add_argument("--strategy", default="single", help="placement on devices")
    parser.add_argument("--precision", default="32-true", help="number format")
    parser.add_argument("--output-dir", default="output/digits", help="where checkpoints and logs go")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, of the split and of the order of the data")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir")
    return parser.parse_args()


def main() -> None:
    """Train and evaluate."""
    options = parse_options()
    torch.manual_seed(options.seed)
    train, held_out = datasets(options.seed)
    fit = Fit(
        build(),
        train_data=train,
        eval_data=held_out,
        strategy=options.strategy,
        precision=options.precision,
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=256,
        learning_rate=options.learning_rate,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        seed=options.seed,
    )
    fit.train(resume_from_checkpoint=options.resume)
    accuracy = fit.evaluate()["eval_accuracy"]
    if fit.strategy.is_main:
        print(f"held-out accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    main()
