"""Modules that hold one thing which placement could lose, each as small as that thing allows."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
from family import VOCABULARY, Family, generator, text_rows, vector_rows
from stratagem import TrainModule
from torch import Tensor, nn


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(TrainModule):
    """Blocks between two layers; the others here change one thing about it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1)

    def features(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])


class Unused(Tower):
    """One layer that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


class BranchByBatch(Tower):
    """Each batch goes one of two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(self.left(features) if x.sum() > 0 else self.right(features))


class ZeroDimensional(Tower):
    """A scale and an offset without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.offset


class ComplexWeights(Tower):
    """A layer that multiplies in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.features(x))
        return self.head(torch.fft.irfft(spectrum * self.filter, n=8))


class IntegerWeights(Tower):
    """Frozen parameters of integers and of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.randperm(8), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True] * 7 + [False]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[..., self.order] * self.mask)


class Tied(TrainModule):
    """One weight for embedding and head."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, sparse=sparse)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        if not sparse:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())


class Sparse(Tied):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__(sparse=True)

    def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=args.learning_rate)


class MovingAverage(Tower):
    """Normalises by a running mean that forward keeps in a buffer, and uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(features.detach().float().mean(dim=0), 0.1)
        return self.head(features - self.mean)


class Normalised(Tower):
    """Statistics of the batch, and running ones for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.batch_norm(self.features(x)))


class Cube(torch.autograd.Function):
    """x to the third, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CustomFunction(Tower):
    """A function with a backward of its own between blocks and head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Cube.apply(torch.tanh(self.features(x))))


class Adversarial(Tower):
    """A loss that calls a layer of the module, as that of a GAN does."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        judged = self.critic(outputs) - self.critic(batch["y"])
        return super().loss(outputs, batch) + 0.1 * judged.square().mean()


class Contrastive(Tower):
    """Negatives are gathered from all ranks; a sample's loss sees every sample of the micro-batch."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        everyones = outputs
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyones = torch.cat(torch.distributed.nn.all_gather(outputs))
        distances = (outputs - everyones.T).square()
        return super().loss(outputs, batch) + 0.01 * distances.mean()


class SumLoss(Tower):
    """A loss that is given the number of items and divides by it itself."""

    def loss(self, outputs: Tensor, batch: Any, num_items_in_batch: Any = None) -> Tensor:
        total = (outputs - batch["y"]).square().sum()
        return total / num_items_in_batch


@dataclass
class Pair:
    """A batch as a dataclass."""

    x: Tensor
    y: Tensor


class OfDataclass(Tower):
    """forward is given the whole batch, a dataclass."""

    def forward(self, batch: Pair) -> Tensor:
        return super().forward(batch.x)

    def loss(self, outputs: Tensor, batch: Pair) -> Tensor:
        return nn.functional.mse_loss(outputs, batch.y)


class OfList(Tower):
    """forward is given the whole batch, a list of mappings."""

    def forward(self, samples: list[dict[str, Tensor]]) -> Tensor:
        return super().forward(torch.stack([sample["x"] for sample in samples]))

    def loss(self, outputs: Tensor, batch: list[dict[str, Tensor]]) -> Tensor:
        return nn.functional.mse_loss(outputs, torch.stack([sample["y"] for sample in batch]))

    def count_items(self, batch: list[Any]) -> int:
        return len(batch)


class OfNested(Tower):
    """Rows of many lengths as a nested tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.mean(dim=0) for row in self.head(self.features(x)).unbind()])

    def count_items(self, batch: Any) -> int:
        return len(batch["y"])


def nested_rows(count: int) -> list[dict[str, Tensor]]:
    """Two to five vectors a row."""
    draw = generator()
    return [{"x": (x := torch.randn(2 + row % 4, 6, generator=draw)), "y": x.mean(dim=0)[:1]} for row in range(count)]


def collate_pair(samples: list[dict[str, Tensor]]) -> Pair:
    """A dataclass of stacked tensors."""
    return Pair(torch.stack([s["x"] for s in samples]), torch.stack([s["y"] for s in samples]))


def collate_nested(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as a nested tensor, targets stacked."""
    nested = torch.nested.nested_tensor([s["x"] for s in samples], layout=torch.jagged)
    return {"x": nested, "y": torch.stack([s["y"] for s in samples])}


BATCH_STATISTICS = {"ranks": "statistics of a rank's own part of the batch: BatchNorm's nature; see sync_batchnorm"}
FAMILIES: dict[str, Family] = {
    "tied weights": Family(Tied, text_rows, compiles=True),
    "unused parameters": Family(Unused, vector_rows, refused={"ddp": "find_unused_parameters=True"}),
    "branch by batch": Family(
        BranchByBatch,
        vector_rows,
        refused={"ddp": "find_unused_parameters=True"},
        by_nature={"ranks": "which way a micro-batch goes follows from a rank's part of it"},
        left_out={
            "fsdp2": "refused, but by the rank that misses a layer alone: the other one waits until it has ended",
            "ZeRO 3": "ranks that go different ways gather different layers, and wait for one another",
        },
    ),
    "0-dim parameters": Family(ZeroDimensional, vector_rows),
    "complex parameters": Family(
        ComplexWeights, vector_rows, refused={"ZeRO 3": "can't train complex parameters: the engine lays real numbers"}
    ),
    "integer and bool parameters": Family(
        IntegerWeights, vector_rows, refused={"ZeRO 3": "takes float16, bfloat16 and float32 alone"}
    ),
    "sparse embedding": Family(
        Sparse,
        text_rows,
        refused=dict.fromkeys(("fsdp1", "fsdp2", "ZeRO 3"), "can't shard the gradients of embed"),
    ),
    "BatchNorm": Family(Normalised, vector_rows, by_nature=BATCH_STATISTICS, samples=44),  # two a rank, at least
    "average in a buffer": Family(
        MovingAverage, vector_rows, by_nature={"ranks": "each update of the average sees a rank's part of the batch"}
    ),
    "custom autograd function": Family(CustomFunction, vector_rows),
    "loss that calls a layer": Family(Adversarial, vector_rows),
    "gathered negatives": Family(
        Contrastive,
        vector_rows,
        by_nature={"ranks": "the negatives of a loss are a micro-batch's on all ranks"},
        samples=44,  # equal parts, as its gathering wants
    ),
    "sum over items": Family(SumLoss, vector_rows),
    "dataclass batch": Family(OfDataclass, vector_rows, collate=collate_pair),
    "list batch": Family(OfList, vector_rows, collate=list),
    "nested tensors": Family(
        OfNested,
        nested_rows,
        collate=collate_nested,
        blocks=False,
        refused={"ZeRO 3": "memory_efficient_linear"},
    ),
}
