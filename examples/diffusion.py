"""Handwritten digits out of noise: a diffusion model (DDPM; Ho et al., 2020) that is sampled with averaged weights.

    python examples/diffusion.py                                # needs scikit-learn and pillow; takes seconds
    python examples/diffusion.py --strategy fsdp2 --devices 2 --per_device_train_batch_size 64
    python examples/diffusion.py --help                         # every option of the run

It ends with a picture, output/diffusion/digits.png, and with how many samples are read as the digit that was asked for
by a classifier that knows real ones alone: with the last weights, and with their moving average.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from gan import CLASSES, SIDE, data  # the example beside this one
from PIL import Image
from safetensors.torch import load_model
from sklearn.svm import SVC
from stratagem import Average, Fit, TrainModule, configure
from torch import Tensor, nn


class Block(nn.Module):
    """Adds to an image's features what they, the noise level and the digit say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x) + condition)))


class Denoiser(TrainModule):
    """Tells noise and image apart, for a digit that it is told.

    Args:
        width: features of an image.
        blocks: residual layers.
        steps: from an image to noise.
    """

    item_name = "images"
    signal: Tensor

    def __init__(self, width: int = 192, blocks: int = 3, steps: int = 200) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(SIDE * SIDE, width), nn.Linear(width, SIDE * SIDE)
        self.step, self.digit = nn.Embedding(steps, width), nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        # What is left of an image's variance after each step falls as a squared cosine (Nichol & Dhariwal, 2021).
        left = torch.cos((torch.arange(1, steps + 1) / steps + 0.008) / 1.008 * math.pi / 2).square()
        self.register_buffer("signal", left.clamp(min=1e-4), persistent=False)

    def velocity(self, noisy: Tensor, step: Tensor, digits: Tensor) -> Tensor:
        """How the noisy image changes as noise takes the image's place (Salimans & Ho, 2022)."""
        x, condition = self.read(noisy), F.silu(self.step(step) + self.digit(digits))
        for block in self.blocks:
            x = block(x, condition)
        return self.write(x)

    def forward(self, images: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise, for each image after a step that is drawn: the velocity there, and what is found from it."""
        step, noise = torch.randint_like(digits, len(self.signal)), torch.randn_like(images)
        left, gone = self.signal[step, None].sqrt(), (1 - self.signal[step, None]).sqrt()
        images = 2 * images - 1
        return left * noise - gone * images, self.velocity(left * images + gone * noise, step, digits)

    def loss(self, outputs: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(*outputs)

    @torch.no_grad()
    def sample(self, digits: Tensor, stages: int = 4) -> Tensor:
        """Go from noise to images of digits; returns what there is at so many stages, the images last."""
        random, shown = torch.Generator().manual_seed(0), []
        x = torch.randn(len(digits), SIDE * SIDE, generator=random)
        for step in reversed(range(len(self.signal))):
            left, before = self.signal[step], self.signal[step - 1] if step else torch.tensor(1.0)
            found = self.velocity(x, torch.full_like(digits, step), digits)
            image, kept = (left.sqrt() * x - (1 - left).sqrt() * found).clamp(-1, 1), left / before
            x = (before.sqrt() * (1 - kept) * image + kept.sqrt() * (1 - before) * x) / (1 - left)
            x += ((1 - before) / (1 - left) * (1 - kept)).sqrt() * torch.randn(x.shape, generator=random)
            if step % (len(self.signal) // stages) == 0:
                shown.append(x)
        return (torch.stack(shown) / 2 + 0.5).clamp(0, 1)


ARGUMENTS = {
    "output_dir": "output/diffusion", "max_steps": 1500, "per_device_train_batch_size": 128, "learning_rate": 2e-3,
    "lr_scheduler_type": "constant", "logging_steps": 100, "save_steps": 500, "save_total_limit": 1,
}  # fmt: skip


def main() -> None:
    """Train, and sample with the last weights and with averaged ones."""
    run, average = configure(Denoiser, data, ARGUMENTS), Average(decay=0.995)
    fit = Fit.from_config(run, callbacks=[average])
    fit.train(resume_from_checkpoint=run.resume)
    output = Path(fit.args.output_dir)
    weights = {"last": fit.export(output / "last.safetensors")}
    weights["averaged"] = fit.export(output / "averaged.safetensors", weights=average)
    if fit.strategy.is_main:
        reader, asked = SVC().fit(*(tensor.numpy() for tensor in data().tensors)), torch.arange(CLASSES).repeat(50)
        for name, path in weights.items():
            model = Denoiser(**run.section("build"))
            load_model(model, path)
            stages = model.eval().sample(asked)
            right = (torch.tensor(reader.predict(stages[-1].numpy())) == asked).float().mean()
            print(f"{name} weights: {right:.3f} of {len(asked)} samples are read as the digit that was asked for")
        rows = torch.cat((stages[:, :CLASSES].flatten(0, 1), stages[-1][CLASSES : 5 * CLASSES]))
        framed = F.pad(rows.view(-1, CLASSES, SIDE, SIDE), (1, 1, 1, 1)).transpose(1, 2)
        points = framed.flatten(0, 1).flatten(1).kron(torch.ones(4, 4))
        Image.fromarray((255 * (1 - points)).round().to(torch.uint8).numpy()).save(output / "digits.png")
        print(f"on the way from noise, and other samples: {output}/digits.png")


if __name__ == "__main__":
    main()
