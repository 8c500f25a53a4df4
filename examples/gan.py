"""A generator of handwritten digits and the critic that it learns from, by turns (WGAN-GP; Gulrajani et al., 2017).

    python examples/gan.py           # needs scikit-learn, for its bundled images, and pillow; takes a minute
    python examples/gan.py --help    # every option of the run

It ends with a picture of generated digits, output/gan/digits.png, and with how far their mean image is from the data's.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from stratagem import Fit, TrainModule, Turn, configure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLASSES, SIDE = 10, 8


class DigitPainter(TrainModule):
    """Paints the digit that it is asked for, from noise."""

    item_name = "images"

    def __init__(self, width: int = 128, noise: int = 32) -> None:
        super().__init__()
        self.noise = noise
        self.generator = layers(noise + CLASSES, width, SIDE * SIDE)
        self.critic = layers(SIDE * SIDE + CLASSES, width, 1)

    def turns(self) -> list[Turn]:
        adam: dict[str, Any] = {"optim": "adam", "optim_args": {"betas": (0.5, 0.9)}, "max_grad_norm": 0}
        return [
            Turn("critic", loss=self.critic_loss, moves="critic", **adam),
            Turn("generator", loss=self.generator_loss, moves="generator", every=5, **adam),
        ]

    def forward(self, digits: Tensor) -> Tensor:
        """Paint: digits of shape (batch,) to images of shape (batch, SIDE * SIDE), from 0 to 1."""
        noise = torch.randn(len(digits), self.noise, device=digits.device)
        return torch.sigmoid(self.generator(torch.cat([noise, F.one_hot(digits, CLASSES).float()], dim=1)))

    def judge(self, images: Tensor, digits: Tensor) -> Tensor:
        return self.critic(torch.cat([images, F.one_hot(digits, CLASSES).float()], dim=1))

    def critic_loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        real, digits = batch
        fake = self(digits).detach()
        share = torch.rand(len(real), 1, device=real.device)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.judge(between, digits).sum(), between, create_graph=True)
        distance = self.judge(real, digits).mean() - self.judge(fake, digits).mean()
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return {"loss": 10 * penalty - distance, "distance": distance}

    def generator_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -self.judge(self(batch[1]), batch[1]).mean()


def layers(takes: int, width: int, gives: int) -> nn.Sequential:
    """Two hidden layers."""
    hidden = [nn.Linear(takes, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(width, gives))


def data() -> TensorDataset:
    """1,797 images of handwritten digits, with what they are."""
    images, digits = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(digits))


@torch.no_grad()
def painted(module: DigitPainter, path: Path, rows: int = 8, scale: int = 4) -> None:
    """Write a picture of generated digits: each column is one digit, each row other noise."""
    images = module(torch.arange(CLASSES).repeat(rows).to(next(module.parameters()).device))
    grid = images.view(rows, CLASSES, SIDE, SIDE).transpose(1, 2).reshape(rows * SIDE, CLASSES * SIDE)
    pixels = (255 * (1 - grid)).round().to(torch.uint8).cpu().numpy()
    picture = Image.fromarray(pixels)
    picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def distance(module: DigitPainter, dataset: TensorDataset) -> float:
    """How far the mean image of generated digits is from the data's, per pixel."""
    real, digits = (tensor.to(next(module.parameters()).device) for tensor in dataset.tensors)
    return (real.mean(0) - module(digits).mean(0)).abs().mean().item()


ARGUMENTS = {
    "output_dir": "output/gan",
    "max_steps": 1500,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "logging_steps": 100,
    "save_steps": 500,
    "save_total_limit": 2,
    "seed": 0,
}
"""What Fit is given, unless the command line or a file says otherwise."""


def main() -> None:
    """Train, and paint."""
    run = configure(DigitPainter, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    module = fit.module
    assert isinstance(module, DigitPainter)
    mean = distance(module, fit.train_data)
    if fit.strategy.is_main:
        path = Path(fit.args.output_dir) / "digits.png"
        painted(module, path)
        print(f"distance of the mean image: {mean:.4f}; see {path}")


if __name__ == "__main__":
    main()
