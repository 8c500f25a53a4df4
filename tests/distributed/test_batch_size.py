"""auto_find_batch_size with several ranks: one is out of memory, and all begin again together."""

import os
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback
from torch import Tensor
from training import Tagger, curves, make_fit, token_rows

STRATEGIES = {
    "ddp": (2, "ddp", {}),
    "fsdp1": (2, "fsdp1", {}),
    "fsdp2": (2, "fsdp2", {}),
    "tp": (2, "tp", {}),
    "fsdp2xtp": (4, "fsdp2", {"tensor_parallel": 2}),
}


class Hungry(Tagger):
    """On rank 1, runs out of memory where a batch has more samples than ``limit``, from a forward on."""

    limit, from_call = 4, 3
    error: type[Exception] = torch.OutOfMemoryError

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls >= self.from_call and len(tokens) > self.limit:
            raise self.error(f"tried to allocate {len(tokens)} samples")
        return super().forward(tokens)


class Mistaken(Hungry):
    """Makes another mistake instead."""

    error = ZeroDivisionError


class Starving(Hungry):
    """Has no memory for one sample."""

    limit = 0


class OutAtTheEnd(Callback):
    """Runs out of memory on rank 1 when the others are done."""

    def on_train_end(self, args: Any, *_: Any, **__: Any) -> None:
        if os.environ["RANK"] == "1" and args.per_device_train_batch_size > 4:
            raise MemoryError


def run(
    *, batch: int, accumulation: int = 1, module: type[Tagger] = Hungry, late: bool = False, **options: Any
) -> dict[str, Any]:
    """One run; what it found and what it logged."""
    torch.manual_seed(int(os.environ["RANK"]))
    fit = make_fit(
        module(),
        token_rows(),
        max_steps=5,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        callbacks=[OutAtTheEnd()] if late else [],
        **options,
    )
    fit.train()
    args = fit.args
    return {
        "sizes": (args.per_device_train_batch_size, args.gradient_accumulation_steps, fit.state.train_batch_size),
        "curves": {name: curves(fit)[name] for name in ("loss", "grad_norm")},
        "calls": getattr(fit.module, "calls", None),
    }


def give_up(**options: Any) -> str:
    """The error of a run in which nothing fits."""
    try:
        run(module=Starving, batch=4, auto_find_batch_size=True, **options)
    except torch.OutOfMemoryError as error:
        return str(error)
    return "it fitted"


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_all_ranks_begin_again_where_one_is_out_of_memory(ranks: dict[int, Ranks], name: str) -> None:
    world_size, strategy, options = STRATEGIES[name]
    world = ranks[world_size]
    found = world.run(run, batch=16, auto_find_batch_size=True, strategy=strategy, options=options, seconds=60.0)
    asked = world.run(run, batch=4, accumulation=4, strategy=strategy, options=options)  # the ranks still work
    assert [result["sizes"] for result in found] == [(4, 4, 4)] * world_size
    assert [result["sizes"] for result in asked] == [(4, 4, None)] * world_size
    assert len(found[0]["curves"]["loss"]) == 5
    for one, other in zip(found, asked, strict=True):
        assert one["curves"] == other["curves"]
        assert one["calls"] == other["calls"]
