"""The kit of faults on real ranks: what strikes inside forward and backward does so under every way of sharding."""

import math
import os
from typing import Any

import pytest
from ranks import Ranks
from stratagem import Callback
from stratagem.testing.faults import DeadStore, Fault, MismatchedCollective, NonfiniteGradient, Raise, UnevenData
from training import Tagger, make_fit, token_rows

STRATEGIES = [
    "ddp",
    pytest.param("fsdp1", marks=pytest.mark.slow),
    "fsdp2",
    pytest.param("tp", marks=pytest.mark.slow),
    pytest.param("deepspeed_stage_2", marks=pytest.mark.slow),
    pytest.param("deepspeed_stage_3", marks=pytest.mark.slow),
]


class Norms(Callback):
    """Keeps each update's norm, as this rank knows it."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        self.found.append(float(fit.grad_norm))


class Noted(Fault):
    """Notes in which update it struck."""

    def strike(self, fit: Any) -> None:
        """Do nothing more."""


def one_nan(strategy: str, parameter: str) -> tuple[list[bool], set[int], set[int]]:
    norms, fault = Norms(), NonfiniteGradient(parameter, rank=1, update=2)
    inside = Noted(rank=0, update=2, phase="backward")
    fit = make_fit(Tagger(1), token_rows(64), strategy=strategy, callbacks=[fault, inside, norms], max_steps=2)
    fit.train()
    return [math.isfinite(norm) for norm in norms.found], fault.struck, inside.struck


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("parameter", ["blocks.0.down.weight", "embed.weight"])
def test_one_ranks_gradient_spoils_the_norm_of_all(ranks: dict[int, Ranks], strategy: str, parameter: str) -> None:
    for rank, found in enumerate(ranks[2].run(one_nan, strategy=strategy, parameter=parameter)):
        # The norm is one number for all ranks, also where a gradient isn't averaged: tensor-parallel ranks compute the
        # gradients of what they hold whole each for itself.
        assert found == ([True, False], {2} if rank == 1 else set(), {2} if rank == 0 else set())


def raising_in_forward(strategy: str) -> str:
    fault = Raise(ValueError("here"), rank=None, update=2, phase="forward")
    fit = make_fit(Tagger(1), token_rows(64), strategy=strategy, callbacks=[fault], max_steps=2)
    with pytest.raises(ValueError, match="here"):
        fit.train()
    return f"{fit.state.global_step} {sorted(fault.struck)}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_raising_inside_forward(ranks: dict[int, Ranks], strategy: str) -> None:
    assert ranks[2].run(raising_in_forward, strategy=strategy) == ["1 [2]", "1 [2]"]


def uneven() -> str:
    with pytest.raises(ValueError) as raised:
        make_fit(Tagger(1), UnevenData(token_rows(64), rank=1, missing=3), strategy="ddp", max_steps=2)
    return str(raised.value)


def test_uneven_data_is_refused(ranks: dict[int, Ranks]) -> None:
    for said in ranks[2].run(uneven):
        assert "61" in said and "64" in said


def dead_store() -> str:
    import torch.distributed as dist

    fit = make_fit(Tagger(1), token_rows(64), strategy="ddp", callbacks=[DeadStore(rank=0, update=2)], max_steps=3)
    fit.train()
    try:
        dist.distributed_c10d._get_default_store().get("nothing")
    except dist.DistError as error:
        return type(error).__name__
    return "alive"


def test_a_dead_store(ranks: dict[int, Ranks]) -> None:
    """Rank 0 holds it here: nobody has it any more, and collectives go on without it."""
    for said in ranks[2].run(dead_store):
        assert said != "alive"
    ranks[2].end()


def alone(call: str) -> str:
    fault = MismatchedCollective(call, rank=int(os.environ["RANK"]), update=1)  # on each rank, so that nothing hangs
    fit = make_fit(Tagger(1), token_rows(64), token_rows(8), strategy="ddp", callbacks=[fault], max_steps=2)
    fit.train()
    return str(fault.struck)


def test_the_mismatched_calls_are_what_they_say(ranks: dict[int, Ranks]) -> None:
    for call in ("evaluate", "barrier", "all_reduce"):
        assert ranks[2].run(alone, call=call) == ["{1}", "{1}"]
