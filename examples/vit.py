"""A Vision Transformer of transformers that learns from image files, which are moved and turned anew in each epoch.

    python examples/vit.py        # needs transformers, scikit-learn, pillow and matplotlib; takes seconds
    python examples/vit.py --strategy fsdp2 --devices 2 --per_device_train_batch_size 16
    python examples/vit.py --build.images mine --build.side 32    # your images, as mine/<class>/<name>.png

The first run writes scikit-learn's digits as such files. It ends with output/vit/predictions.png. --help says the rest.
"""

import contextlib
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch
from classify_text import accuracy  # of the example beside this one
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from stratagem import Fit, TrainModule, configure
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification


class ImageFiles(Dataset):
    """Grey images from files, each with its class, the name of its directory; moved and turned where ``changed``."""

    def __init__(self, paths: list[Path], classes: list[str], side: int, changed: bool) -> None:
        self.paths, self.classes, self.side, self.changed = paths, classes, side, changed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.open(self.paths[index]).convert("L").resize((self.side, self.side))
        if self.changed:
            # torch's random numbers are in the run's checkpoints: a resumed run reads the same.
            most = torch.tensor([20, self.side / 8, self.side / 8])
            angle, right, down = ((torch.rand(3) - 0.5) * most).tolist()
            image = image.rotate(angle, Image.Resampling.BILINEAR, translate=(right, down))
        pixels = torch.from_numpy(numpy.array(image, dtype=numpy.float32))[None] / 127.5 - 1
        return {"pixel_values": pixels, "labels": self.classes.index(self.paths[index].parent.name)}


def classes_in(images: str) -> list[str]:
    """The names of the directories in a directory; where there is none, digits are written there first."""
    if not Path(images).is_dir():
        partial = Path(f"{images}.{os.getpid()}")  # each rank writes its own; that of the first gets the name
        for number, (pixels, digit) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
            path = partial / str(digit) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels.reshape(8, 8) * 15.9).astype(numpy.uint8)).save(path)
        with contextlib.suppress(OSError):
            partial.rename(images)
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(path.name for path in Path(images).iterdir() if path.is_dir())


def build(images: str = "output/digit_images", side: int = 8, width: int = 64, layers: int = 2) -> dict[str, Any]:
    """The model, and what an evaluation says beside the loss.

    Args:
        images: a directory with a directory of PNG files for each class.
        side: pixels that images are made wide and high; a patch is a quarter of it.
        width, layers: of the Transformer.
    """
    config = ViTConfig(
        image_size=side, patch_size=side // 4, num_channels=1, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, id2label=dict(enumerate(classes_in(images))),
        initializer_range=0.1,
    )  # fmt: skip
    return {"module": TrainModule.wrap(ViTForImageClassification(config)), "compute_metrics": accuracy}


def data(images: str = "output/digit_images", side: int = 8) -> tuple[ImageFiles, ImageFiles]:
    """Images to learn from, and one in five, by a checksum of its name, held out."""
    classes, paths = classes_in(images), sorted(Path(images).glob("*/*.png"))
    held_out = [path for path in paths if zlib.crc32(path.stem.encode()) % 5 == 0]
    train = sorted(set(paths) - set(held_out))
    return ImageFiles(train, classes, side, changed=True), ImageFiles(held_out, classes, side, changed=False)


def draw(path: Path, train: ImageFiles, held_out: ImageFiles, answers: list[int]) -> None:
    """Write a picture: a training image each time that it is read, some held-out ones, and some that were misread."""
    found = [(held_out[index], answer) for index, answer in enumerate(answers)]
    misread = [pair for pair in found if pair[0]["labels"] != pair[1]]
    shown = [(train[0], train[0]["labels"]) for _ in range(10)] + found[:: len(found) // 20][:20] + misread[:10]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for (sample, answer), axes in zip(shown, figure.subplots(4, 10).flat, strict=False):
        given, truth = held_out.classes[answer], held_out.classes[sample["labels"]]
        axes.imshow(sample["pixel_values"][0], cmap="gray_r" if given == truth else "Reds", vmin=-1, vmax=1)
        axes.set(title=given if given == truth else f"{given}, is {truth}", xticks=[], yticks=[])
    figure.savefig(path, dpi=60)


ARGUMENTS = {
    "output_dir": "output/vit", "num_train_epochs": 15, "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 512, "learning_rate": 3e-3, "warmup_steps": 0.1, "logging_strategy": "epoch",
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1,
}  # fmt: skip


def main() -> None:
    """Train, and show what held-out images are taken for."""
    run = configure(build, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    found = fit.predict(fit.eval_data)
    if fit.strategy.is_main:
        answers = found.predictions["logits"].argmax(dim=1).tolist()
        draw(Path(fit.args.output_dir) / "predictions.png", fit.train_data, fit.eval_data, answers)
        print(f"held-out accuracy: {found.metrics['test_accuracy']:.4f} of {len(answers)} images")


if __name__ == "__main__":
    main()
