"""Row: predicting, a batch at a time, beside the same loop written down."""

import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ... import Fit, TrainModule
from .measuring import measuring

TITLE = "A batch of fit.predict: 1,000 batches of 64, all outputs kept"
ROUNDS = 5
LIMIT = "by hand"
BATCHES, BATCH_SIZE, WIDTH, CLASSES = 1_000, 64, 32, 10


class Classifier(TrainModule):
    """A small model, so that what is around it is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])


class Rows(Dataset[dict[str, Tensor]]):
    """Samples in memory, of which a batch is one index."""

    def __init__(self, labelled: bool) -> None:
        self.columns = {"x": torch.randn(BATCHES * BATCH_SIZE, WIDTH)}
        if labelled:
            self.columns["labels"] = torch.randint(CLASSES, (BATCHES * BATCH_SIZE,))

    def __len__(self) -> int:
        return BATCHES * BATCH_SIZE

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {name: column[indices] for name, column in self.columns.items()}


def loader(labelled: bool) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(labelled), batch_size=BATCH_SIZE, collate_fn=lambda batch: batch)


def ours(labelled: bool, use: Callable[[Fit, DataLoader[dict[str, Tensor]]], object]) -> dict[str, float]:
    data = loader(labelled)
    with tempfile.TemporaryDirectory() as directory:
        fit = Fit(Classifier(), output_dir=directory, loggers=(), report=False, progress=False)
        use(
            fit,
            DataLoader(torch.utils.data.Subset(data.dataset, range(640)), batch_size=64, collate_fn=data.collate_fn),
        )
        with measuring(BATCHES) as figures:
            use(fit, data)
    return figures


def stratagem() -> dict[str, float]:
    """``fit.predict``."""
    return ours(False, lambda fit, data: fit.predict(data))


def by_hand() -> dict[str, float]:
    """All outputs in one tensor that was made for them."""
    module, data = Classifier().eval(), loader(False)
    with measuring(BATCHES) as figures, torch.no_grad():
        outputs = torch.empty(BATCHES * BATCH_SIZE, CLASSES)
        for number, batch in enumerate(data):
            outputs[number * BATCH_SIZE : (number + 1) * BATCH_SIZE] = module(batch["x"])
    return figures


CONTESTANTS = {"stratagem": stratagem, "by hand": by_hand}
