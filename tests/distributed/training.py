"""The module, the data and the run that most tests in here compare: ``from training import train``."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from stratagem import Fit, FitArguments, TrainModule
from stratagem.framework.module import IGNORED_LABEL
from stratagem.strategies import Strategy, get_strategy
from torch import Tensor, nn

LENGTH = 5
SAMPLES = 203  # no batch size used in here divides it
VOCABULARY = 11  # the first dimension of the embedding, which neither 2 nor 4 ranks divide
WIDTH = 6

# Ranks, strategy and its options.
PLACEMENTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "ddp", {}),
    (2, "fsdp1", {}),
    (2, "fsdp2", {}),
    (2, "tp", {}),
    (4, "fsdp2", {"tensor_parallel": 2}),
]
everywhere = pytest.mark.parametrize(("world", "strategy", "options"), PLACEMENTS, ids=str)


def share_of_16(strategy: str, world: int, options: dict[str, Any]) -> int:
    """Samples per rank in an update of 16."""
    return 16 if strategy == "tp" else 16 * options.get("tensor_parallel", 1) // world


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int = WIDTH, hidden: int = 4 * WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """Blocks between two layers that are outside of all blocks."""

    def __init__(self, takes: int, gives: int, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(takes, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.last = nn.Linear(width, gives)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Tagger(TrainModule):
    """Predicts a class per token, with everything that placement could lose: a weight tied between input and output, a
    first dimension that the ranks don't divide, a frozen layer, buffers of two kinds, three parameter groups.
    """

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embed.weight
        self.register_buffer("position", torch.randn(LENGTH, WIDTH))
        self.register_buffer("order", torch.randperm(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)) + self.position[self.order]
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        decayed, plain = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and parameter is not self.embed.weight:
                (plain if "norm" in name or name.endswith("bias") else decayed).append(parameter)
        groups = [
            {"params": [self.embed.weight], "lr": 0.3 * args.learning_rate},
            {"params": decayed, "weight_decay": 0.1},
            {"params": plain, "weight_decay": 0.0, "betas": (0.8, 0.99)},
        ]
        fused = self.head.weight.device.type == "cpu"  # XLA has no such kernels
        return torch.optim.AdamW(groups, lr=args.learning_rate, eps=1e-4, fused=fused)

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


def token_rows(count: int = SAMPLES) -> list[dict[str, Tensor]]:
    """Tokens and labels. From none to all of a row's labels count, so that no two ranks have equally many."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for i in range(count):
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        labels = (tokens * 3 + 1) % VOCABULARY
        labels[torch.rand(LENGTH, generator=generator) < (i % 7) / 6] = IGNORED_LABEL
        rows.append({"tokens": tokens, "labels": labels})
    return rows


def make_strategy(name: str, options: dict[str, Any] | None = None) -> Strategy:
    """A strategy by its registered name and options."""
    strategy = get_strategy(name)
    return type(strategy)(**options) if options else strategy  # a name may stand for options, as deepspeed_stage_3 does


def make_fit(
    module: TrainModule,
    train_data: Any,
    eval_data: Any = None,
    *,
    strategy: str = "single",
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Fit:
    """A silent Fit that logs each update, writes nothing, and clips so that it shows."""
    defaults: dict[str, Any] = {
        "max_steps": 20,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "max_grad_norm": 0.5,
        "progress": False,
        "loggers": (),
        "report": False,
    }
    return Fit(module, train_data, eval_data, strategy=make_strategy(strategy, options), **{**defaults, **arguments})


def train(
    *,
    module: type[TrainModule] = Tagger,
    data: Any = None,
    export: str | Path | None = None,
    resume: str | Path | bool | None = None,
    **arguments: Any,
) -> dict[str, list[Any]]:
    """One run, in the test's process or on a rank.

    Args:
        module: made with other initial values on each rank; those of rank 0 (and of one process) must win.
        data: rows; None means token_rows().
        export: where the final weights go.
        resume: see Fit.train.
        **arguments: of make_fit.

    Returns:
        The training logs, a list of one value an update under each name.
    """
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    fit = make_fit(module(), token_rows() if data is None else data, **arguments)
    fit.train(resume_from_checkpoint=resume)
    if export is not None:
        fit.export(export)
    return curves(fit)


def curves(fit: Fit) -> dict[str, list[Any]]:
    """The training logs of a run, turned from a list of mappings into a mapping of lists; without seconds."""
    logs = [log for log in fit.state.log_history if "loss" in log]
    names = {name for log in logs for name in log} - {"slowest_rank", "slowest_rank_ratio", "data_wait_seconds"}
    return {name: [log[name] for log in logs if name in log] for name in names}
