"""What the zoo needs to know of a family of models: how to make a tiny one, its rows, and what can't be had of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from stratagem import TrainModule
from stratagem.framework.module import IGNORED_LABEL
from torch import Tensor

VOCABULARY, LENGTH, CLASSES = 48, 10, 3
WIDTH, HEADS, LAYERS = 32, 4, 2


@dataclass(frozen=True)
class Family:
    """A tiny model of one family, and rows to train it on.

    Args:
        make: makes the module with random weights, drawn from torch's global generator.
        rows: makes so many samples; the same each time.
        collate: samples to batch, for data that is given as a ready DataLoader; None for the framework's own.
        packages: that it needs beside torch.
        tp: whether tensor parallelism has a plan for it.
        blocks: whether it has blocks that gradient_checkpointing recomputes.
        compiles: whether torch_compile is tried on it; compiling takes seconds.
        refused: placement to the words of its refusal.
        left_out: placement to why it isn't tried: what neither works nor can be refused.
        by_nature: placement to why its numbers are others than one device's, and rightly so; "ranks" stands for every
            placement on several.
        tolerance: of losses and norms, relative to one device's.
        adam_epsilon: of AdamW; larger where a gradient is 0 in exact arithmetic, and its rounding would be divided by
            itself.
        samples: in its data. Updates take eight: by default the sixth begins in the short end of the first epoch, whose
            last micro-batch is shorter still.
    """

    make: Callable[[], TrainModule]
    rows: Callable[[int], Sequence[Any]]
    collate: Callable[[list[Any]], Any] | None = None
    packages: tuple[str, ...] = ()
    tp: bool = False
    blocks: bool = True
    compiles: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    by_nature: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-4
    adam_epsilon: float = 1e-8
    samples: int = 43

    def is_installed(self) -> bool:
        """Whether its packages are."""
        return all(find_spec(package) for package in self.packages)


def generator() -> torch.Generator:
    """The random numbers that rows are made of."""
    return torch.Generator().manual_seed(5)


def padded_labels(tokens: Tensor, row: int) -> Tensor:
    """The tokens as labels, with so much padding at the end that no two ranks have equally many labels."""
    labels = tokens.clone()
    labels[len(labels) - row % (len(labels) - 1) :] = IGNORED_LABEL
    return labels


def text_rows(count: int) -> list[dict[str, Tensor]]:
    """Tokens, mask and labels."""
    draw, rows = generator(), []
    for row in range(count):
        tokens = torch.randint(4, VOCABULARY, (LENGTH,), generator=draw)
        labels = padded_labels(tokens, row)
        rows.append({"input_ids": tokens, "attention_mask": (labels != IGNORED_LABEL).long(), "labels": labels})
    return rows


def class_rows(count: int) -> list[dict[str, Tensor]]:
    """Tokens and one class a row."""
    draw = generator()
    tokens = torch.randint(4, VOCABULARY, (count, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": row[0] % CLASSES} for row in tokens]


def token_class_rows(count: int) -> list[dict[str, Tensor]]:
    """Tokens and a class for each, some of them padding."""
    rows = text_rows(count)
    for row in rows:
        labels = row["labels"]
        row["labels"] = torch.where(labels < 0, labels, labels % CLASSES)
    return rows


def translation_rows(count: int) -> list[dict[str, Tensor]]:
    """Source tokens and target labels of another length."""
    draw, rows = generator(), []
    for row in range(count):
        source = torch.randint(4, VOCABULARY, (LENGTH,), generator=draw)
        rows.append({"input_ids": source, "labels": padded_labels(source[:7].flip(0), row)})
    return rows


def image_rows(count: int, size: int = 16) -> list[dict[str, Tensor]]:
    """Images and a class each."""
    draw = generator()
    images = torch.randn(count, 3, size, size, generator=draw)
    return [{"pixel_values": image, "labels": torch.tensor(row % CLASSES)} for row, image in enumerate(images)]


def vector_rows(count: int, features: int = 6) -> list[dict[str, Tensor]]:
    """Vectors and a number each."""
    draw = generator()
    x = torch.randn(count, features, generator=draw)
    return [{"x": row, "y": row[:1] * 0.5 - row[1:2].tanh()} for row in x]


def wrapped(make: Callable[[], Any], **options: Any) -> Callable[[], TrainModule]:
    """Makes a TrainModule around the model that ``make`` makes."""
    return lambda: TrainModule.wrap(make(), **options)
