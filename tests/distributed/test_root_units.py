"""FSDP2's embedding and head: whole in their own forward alone, unless something else uses them."""

import os
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import TrainModule
from stratagem.strategies.fsdp2.root_units import root_units
from test_collectives import Traffic
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training import Block, make_fit

ROWS, COLUMNS, LENGTH = 2**17, 32, 4


class Large(TrainModule):
    """Its embedding and its head have 16 MiB each; its blocks are small. Notes what is whole while a block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[tuple[str, ...]] = []
        self.embed = nn.Embedding(ROWS, COLUMNS)
        self.blocks = nn.ModuleList(Block(COLUMNS, 2 * COLUMNS) for _ in range(2))
        self.norm = nn.LayerNorm(COLUMNS)
        self.head = nn.Linear(COLUMNS, ROWS, bias=False)

    def note(self, where: str) -> None:
        if self.training:
            layers = {"embed": self._modules["embed"], "norm": self.norm, "head": self._modules["head"]}
            held = [name for name, layer in layers.items() if not is_sharded(layer._parameters["weight"])]  # type: ignore[union-attr]
            self.whole.append((where, *held))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            self.note(f"forward {i}")
            x = block(x)
            if self.training:
                x.register_hook(lambda _, i=i: self.note(f"backward {i}"))
        return self.head(self.norm(x))

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        self.note("loss")
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["tokens"].flatten())

    def tensor_parallel_plan(self) -> dict[str, str]:
        cut = {"embed": "embedding", "head": "colwise_gather"}
        return {**cut, "blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def configure_optimizer(self, args: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=30.0, momentum=0.9)


def is_sharded(parameter: Any) -> bool:
    return isinstance(parameter, DTensor)


class HeadInLoss(Large):
    """The head's forward runs, and the loss uses its weight once more: gradients come by two ways."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(outputs, batch) + (self.head.weight[:7] ** 2).sum()


class HeadInLossAlone(Large):
    """The head isn't called at all; the loss computes with its weight."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(nn.functional.linear(outputs, self.head.weight), batch)


class UsedEverywhere(Large):
    """The embedding's weight is used before its forward and after all; embedding and head are called twice."""

    def forward(self, tokens: Tensor) -> Tensor:
        scale = self.embed.weight[0].mean()
        x = super().forward(tokens)
        x = x + nn.functional.linear(x[..., :COLUMNS], self.embed.weight) + scale
        return x + self.head(self.embed(tokens.flip(-1)))


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"tokens": torch.randint(ROWS, (LENGTH,), generator=generator)} for _ in range(16)]


def run(module: str, **arguments: Any) -> dict[str, Any]:
    """Two updates of 8 samples in 2 micro-batches, and an evaluation after each: losses and norms, what was whole
    where, and how often something was gathered.
    """
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    kind: type[Large] = globals()[module]
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    if "tensor_parallel" in arguments.get("options", {}):
        size *= arguments["options"]["tensor_parallel"]
    shared: dict[str, Any] = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "shuffle": False}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
    fit = make_fit(kind(), rows(), rows()[:4], **shared, **sizes, **arguments)
    with Traffic() as traffic:
        fit.train()
    curve = [log[key] for log in fit.state.log_history for key in ("loss", "grad_norm", "eval_loss") if key in log]
    sent = [name for messages in traffic.messages.values() for name, _, _ in messages]
    return {"curve": curve, "whole": [list(at) for at in fit.module.whole], "gathers": sent.count("allgather_base")}


@pytest.mark.slow
@pytest.mark.parametrize("module", [Large, HeadInLoss, HeadInLossAlone, UsedEverywhere])
def test_curves_are_those_of_one_device(ranks: dict[int, Ranks], module: type[Large]) -> None:
    expected = run(module.__name__)
    for found in ranks[2].run(run, module=module.__name__, strategy="fsdp2"):
        assert found["curve"] == pytest.approx(expected["curve"], rel=1e-5)
        if module is Large:  # the embedding is never whole beside a block, nor the head but for the loss
            forward, backward = [["forward 0", "norm"], ["forward 1", "norm"]], [["backward 1", "norm"]]
            one = [*forward, ["loss", "norm", "head"], *backward, ["backward 0", "norm"]]
            assert found["whole"] == 4 * one
            # The root's norm, embedding, head, and each block twice; in the evaluations' forwards, once. The norm is
            # there still when an evaluation is over.
            assert found["gathers"] == 4 * (3 + 2 * 2) + 2 * (3 + 2) - 1


def layers_of(module: nn.Module) -> dict[str, bool]:
    names = {layer: name for name, layer in module.named_modules()}
    found = root_units(module, module.shard_units(), set())  # type: ignore[operator]
    return {names[layer]: follows for layer, follows in found.items()}


def test_which_layers_are_units() -> None:
    with torch.device("meta"):
        assert layers_of(Large()) == {"embed": False, "head": True}
        tied = Large()
        tied.head.weight = tied.embed.weight
        assert layers_of(tied) == {}
        small = Large()
        small.head = nn.Linear(COLUMNS, 8)
        assert layers_of(small) == {"embed": False}
        two_heads = Large()
        two_heads.second = nn.Linear(COLUMNS, ROWS)
        assert layers_of(two_heads) == {"embed": False}
        nested = Large()
        nested.embed = nn.Sequential(nn.Embedding(ROWS, COLUMNS), nn.Dropout())
        assert layers_of(nested) == {"embed.0": False, "head": True}
        no_blocks = Large()
        no_blocks.blocks = nn.ModuleList()
        assert layers_of(no_blocks) == {}
