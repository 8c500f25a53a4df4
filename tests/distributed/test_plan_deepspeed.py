"""A plan of a ZeRO run against the run: bytes on every rank, by hand too, and collectives of an update, are equal."""

from collections.abc import Iterator
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from planned_runs import observed, planned
from ranks import Ranks
from test_plan import check_account, values_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
]
ACCUMULATED = {"gradient_accumulation_steps": 2, "precision": "bf16-mixed"}
CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    *((2, {"stage": stage}, {}) for stage in range(4)),
    (2, {"stage": 3}, ACCUMULATED),
    (2, {"stage": 2, "offload_optimizer": True}, {}),
    (2, {"stage": 3, "offload_optimizer": True, "offload_parameters": True}, {}),
    (4, {"stage": 3}, {}),
]


@pytest.fixture(scope="module")
def zero_ranks() -> Iterator[dict[int, Ranks]]:
    """Ranks of their own: the other tests' ranks never import DeepSpeed."""
    ranks = {size: Ranks(size) for size in (1, 2, 4)}
    yield ranks
    for each in ranks.values():
        each.end()


def play(**asked: Any) -> list[dict[str, Any]]:
    """Play ranks, with DeepSpeed imported once for all of them."""
    import deepspeed  # noqa: F401

    return planned(**asked)


def by_hand(groups: list[list[int]], stage: int, world: int) -> tuple[int, int, int]:
    """Bytes of trained parameters, of optimizer state with master weights, and of numbers in this rank's shards.

    Stages 1 and 2 lay a group of the optimizer end to end, and fill it up to a multiple of twice the ranks. Stage 3
    cuts each parameter, and keeps small ones, as all of these are, whole as well. Adam has two moments of each number
    that it steps, and a count for each group of them.
    """
    if stage == 0:
        numbers = sum(map(sum, groups))
        return 4 * numbers, 8 * numbers + 4 * sum(map(len, groups)), numbers
    if stage == 3:
        shard = sum(ceil(numel / world) for group in groups for numel in group)
        return 4 * shard * (1 + world), 12 * shard + 4 * len(groups), shard
    whole = sum(ceil(sum(group) / (2 * world)) * 2 * world for group in groups)
    return 4 * whole, 12 * whole // world + 4 * len(groups), whole // world


@pytest.mark.parametrize(("world", "options", "arguments"), CASES, ids=str)
def test_a_plan_says_what_a_zero_run_holds_and_sends(
    zero_ranks: dict[int, Ranks], tmp_path: Path, world: int, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    target = "planned_runs:build"
    real = zero_ranks[world].run(
        observed, target=target, strategy="deepspeed", options=options, directory=str(tmp_path), **arguments
    )
    values = values_of("deepspeed", options, arguments)
    ends = [0, world - 1]
    on_host = [
        *(("parameters",) if "offload_parameters" in options else ()),
        *(("gradients", "optimizer_state") if "offload_optimizer" in options else ()),
    ]
    answers = zero_ranks[1].run(play, target=target, world=world, ranks=ends, values=values)[0]
    for rank, answer in zip(ends, answers, strict=True):
        run, account = real[rank], check_account(answer, real[rank], rank, on_host)
        parameters, state, shard = by_hand(run["groups"], options["stage"], world)
        assert (account["parameters"], account["optimizer_state"]) == (parameters, state)
        assert account["gradients"] >= 4 * shard


@pytest.mark.parametrize("stage", [2, 3])
def test_what_cannot_be_played_has_its_shards(zero_ranks: dict[int, Ranks], stage: int) -> None:
    answer = zero_ranks[1].run(
        play,
        target="planned_models:build_choosing",
        world=2,
        ranks=[1],
        values=values_of("deepspeed", {"stage": stage}, {}),
    )[0][0]
    account = answer["account"]
    assert "made.sum() > 0" in account["stopped"]
    # A weight of 4 x 3, with weight decay, and a bias of 3: 16 numbers where they are filled up to multiples of 4, and
    # shards of 6 and 2, beside all 16, at stage 3, which computes with none of them here.
    assert (account["gradients"], account["optimizer_state"]) == (4 * 8, 3 * 4 * 8 + 2 * 4)
