"""auto_find_batch_size with several ranks: one is out of memory, and all begin again together."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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


class FailingBackward(torch.autograd.Function):
    """Is out of memory in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise MemoryError


class HungryInBackward(Tagger):
    """On rank 1, runs out of memory in the backward of the third micro-batch and after, between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.blocks[0].register_forward_hook(self.fail)

    def fail(self, block: Any, inputs: Any, outputs: Tensor) -> Tensor | None:
        self.calls += 1
        fails = os.environ["RANK"] == "1" and self.calls >= 3 and len(outputs) > 4
        return FailingBackward.apply(outputs) if fails else None


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


HELD: list[Any] = []


def run_beside_a_list_of_groups(**options: Any) -> dict[str, Any]:
    """A run in a process where a list holds the group of all ranks, as DeepSpeed's ZeRO optimizers leave one."""
    dist.barrier()
    HELD[:] = [dist.group.WORLD]
    return run(**options)


def give_up(**options: Any) -> str:
    """The error of a run in which nothing fits."""
    try:
        run(module=Starving, batch=4, auto_find_batch_size=True, **options)
    except torch.OutOfMemoryError as error:
        return str(error)
    return "it fitted"


def fail() -> tuple[str, str, int]:
    """The error of a run in which rank 1 makes a mistake, and the batch size at its end."""
    fit = make_fit(
        Mistaken(), token_rows(), strategy="ddp", per_device_train_batch_size=8, auto_find_batch_size=True, max_steps=5
    )
    try:
        fit.train()
    except Exception as error:
        said = type(error).__name__, str(error), fit.args.per_device_train_batch_size
    fit.strategy.release(fit.module)
    fit.strategy.tear_down()  # as the end of the process does
    return said


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2"])
def test_out_of_memory_in_the_middle_of_backward(ranks: dict[int, Ranks], name: str) -> None:
    options = {"module": HungryInBackward, "strategy": name}
    found = ranks[2].run(run, batch=8, auto_find_batch_size=True, seconds=60.0, **options)
    asked = ranks[2].run(run, batch=4, accumulation=2, **options)
    assert [result["sizes"] for result in found] == [(4, 2, 4)] * 2
    assert [result["curves"] for result in found] == [result["curves"] for result in asked]
    assert [result["calls"] for result in found] == [result["calls"] for result in asked]


@pytest.mark.slow
def test_a_list_that_holds_a_process_group_keeps_no_rank_waiting(ranks: dict[int, Ranks]) -> None:
    ranks[2].run(run, batch=4, strategy="ddp")  # so that the ranks have joined their group
    options = {"batch": 16, "auto_find_batch_size": True, "strategy": "ddp"}
    found = ranks[2].run(run_beside_a_list_of_groups, seconds=60.0, **options)
    assert [result["sizes"] for result in found] == [(4, 4, 4)] * 2


@pytest.mark.slow
def test_a_rank_that_was_done_begins_again_too(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    options = {"module": Tagger, "strategy": "ddp", "save_strategy": "steps", "save_steps": 2, "async_save": True}
    options["output_dir"] = str(tmp_path)  # the background writer's process group is left, too
    found = ranks[2].run(run, batch=8, late=True, auto_find_batch_size=True, seconds=60.0, **options)
    asked = ranks[2].run(run, batch=4, accumulation=2, **options)
    assert [result["sizes"] for result in found] == [(4, 2, 4)] * 2
    assert [result["curves"] for result in found] == [result["curves"] for result in asked]


@pytest.mark.slow
def test_at_one_all_give_up_with_the_figures_of_the_rank(ranks: dict[int, Ranks]) -> None:
    said = ranks[2].run(give_up, strategy="fsdp2", seconds=60.0)
    assert said[0] == said[1]
    assert "even with per_device_train_batch_size=1. Rank 1 in forward, " in said[0]
    assert ": OutOfMemoryError: tried to allocate 1 samples. Memory: cpu resident " in said[0]
    assert 0.05 < float(said[0].partition("cpu resident ")[2].partition(" GiB")[0]) < 50
    assert ranks[2].run(run, batch=4, strategy="fsdp2")[0]["sizes"] == (4, 1, None)  # the ranks still work


@pytest.mark.slow
def test_another_failure_of_one_rank_ends_the_run_on_all(ranks: dict[int, Ranks]) -> None:
    said = ranks[2].run(fail, seconds=60.0)
    ranks[2].end()  # these have left their process group
    assert said[1] == ("ZeroDivisionError", "tried to allocate 8 samples", 8)
    assert said[0][0] == "AnotherRankFailed"
    assert "ZeroDivisionError: tried to allocate 8 samples on rank 1 (host " in said[0][1]
    assert said[0][2] == 8  # it didn't begin again with half
