"""Two towers that learn which lower half of a handwritten digit belongs to which upper half, over all ranks.

    python examples/contrastive.py      # needs scikit-learn, for its bundled images; takes seconds
    python examples/contrastive.py --strategy ddp --devices 2 --per_device_train_batch_size 128   # the same loss
    python examples/contrastive.py --contrastive_chunks 4    # the same loss, a quarter of the activations in memory
    python examples/contrastive.py --help                    # every option of the run

It ends with how often the right lower half is found among all that it never saw, and with a picture of what is found.
"""

import struct
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from stratagem import Fit, TrainModule, configure
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Halves(TrainModule):
    """An encoder for upper halves and one for lower ones, and InfoNCE between the two (Radford et al., CLIP, 2021)."""

    item_name = "images"

    def __init__(self, width: int, features: int, dropout: float) -> None:
        super().__init__()
        self.upper, self.lower = (
            nn.Sequential(
                nn.Flatten(), nn.Linear(32, width), nn.GELU(), nn.Dropout(dropout),
                nn.Linear(width, width), nn.GELU(), nn.Linear(width, features),
            )
            for _ in range(2)
        )  # fmt: skip
        self.scale = nn.Parameter(torch.tensor(2.0))  # the logarithm of what similarities are multiplied by

    def forward(self, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1: two of (batch, features)."""
        return F.normalize(self.upper(upper)), F.normalize(self.lower(lower))

    def loss(self, outputs: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Each half is to choose its other half among those of all ranks, whose own rows come first."""
        upper, lower = outputs
        scale, own = self.scale.exp(), torch.arange(len(upper), device=upper.device)
        finds_lower = F.cross_entropy(scale * upper @ self.gather(lower).T, own)
        finds_upper = F.cross_entropy(scale * lower @ self.gather(upper).T, own)
        return (finds_lower + finds_upper) / 2


def build(width: int = 256, features: int = 64, dropout: float = 0.2) -> Halves:
    """The model, for tools that train, time or export it.

    Args:
        width, features: of the encoders' hidden layers, and of an embedding.
        dropout: the part of the first hidden features that is left out.
    """
    return Halves(width, features, dropout)


def data(held_out: int = 300) -> tuple[TensorDataset, TensorDataset]:
    """Upper and lower halves of 8 x 8 images, 1,797 in all: for training, and held out.

    Args:
        held_out: how many images are held out, the last ones: of writers that the others aren't of.
    """
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    train, rest = images[:-held_out], images[-held_out:]
    return TensorDataset(train[:, :4], train[:, 4:]), TensorDataset(rest[:, :4], rest[:, 4:])


def draw(path: Path, upper: Tensor, lower: Tensor, order: Tensor, rows: int = 12, size: int = 6) -> None:
    """Write a picture: each row an image as it is, and its upper half with the five lower halves found first.

    Args:
        path: of the PNG file.
        upper, lower: halves of images, (images, 4, 8).
        order: the lower halves found for each upper half, the nearest first.
        rows, size: how many images, and how many pixels a point of one becomes.
    """
    lines = []
    for i in torch.arange(rows) * (len(upper) // rows):
        shown = [torch.cat([upper[i], lower[j]]) for j in (i, *order[i, :5])]
        shown[0] = F.pad(shown[0], (0, 4), value=0.5)  # a bar between what is and what was found
        lines.append(torch.cat([F.pad(image, (1, 1, 1, 1), value=0.2) for image in shown], dim=1))
    points = torch.cat(lines).kron(torch.ones(size, size))
    pixels = b"".join(b"\0" + bytes(line.tolist()) for line in (points * 255).to(torch.uint8))
    head = struct.pack(">IIBBBBB", points.shape[1], points.shape[0], 8, 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    written = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


ARGUMENTS = {
    "output_dir": "output/contrastive", "num_train_epochs": 60, "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 300, "learning_rate": 2e-3, "weight_decay": 0.1, "logging_strategy": "epoch",
    "save_strategy": "epoch", "save_total_limit": 2,
}  # fmt: skip


def main() -> None:
    """Train, find the lower half of each held-out image, and draw some."""
    run = configure(build, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    found = fit.predict(fit.eval_data).predictions
    if fit.strategy.is_main:
        embedded, images = [torch.as_tensor(part) for part in found], fit.eval_data.tensors
        order = (embedded[0] @ embedded[1].T).argsort(dim=1, descending=True)
        is_right = order == torch.arange(len(order))[:, None]
        first, among_five = (is_right[:, :k].any(dim=1).float().mean() for k in (1, 5))
        print(f"held-out retrieval among {len(order)}: {first:.3f} at once, {among_five:.3f} among the first five")
        draw(Path(fit.args.output_dir) / "found.png", images[0], images[1], order)
        print(f"what was found: {fit.args.output_dir}/found.png")


if __name__ == "__main__":
    main()
