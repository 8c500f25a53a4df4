"""A plan against the run that was planned: bytes on every rank, and collectives of an update, are equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from planned_runs import observed, planned
from ranks import Ranks

HELD = "parameters", "frozen_parameters", "gradients", "optimizer_state", "buffers", "averaged_weights"
HALF = {"precision": "bf16-true"}
AVERAGES = ("averaged_weights_on_host",)
OFFLOADED = "parameters", "gradients", "optimizer_state"
EIGHT_BITS = {"optim": "adamw_8bit"}
CASES: list[tuple[int, str, dict[str, Any], str, dict[str, Any]]] = [
    (1, "single", {}, "build", {}),
    (1, "single", {}, "build", HALF),
    (1, "single", {}, "build_square", EIGHT_BITS),
    (1, "single", {}, "build_adapted_wide", EIGHT_BITS),
    (1, "single", {}, "build_quantized", {"precision": "bf16-mixed", **EIGHT_BITS}),
    (2, "ddp", {}, "build_adapted_wide", EIGHT_BITS),
    (2, "ddp", {}, "build_quantized", EIGHT_BITS),
    (2, "fsdp2", {}, "build_quantized_in_float32", {}),
    (2, "ddp", {}, "build", {"gradient_accumulation_steps": 2}),
    (2, "ddp", {"compress_gradients": "bf16"}, "build", {}),
    (2, "ddp", {}, "build_normed", {}),
    (2, "fsdp1", {}, "build", {}),
    (2, "fsdp1", {}, "build", HALF),
    (2, "fsdp2", {}, "build", {}),
    (2, "fsdp2", {"reshard_after_forward": False}, "build", {"gradient_accumulation_steps": 2}),
    (2, "fsdp2", {}, "build", HALF),
    (2, "fsdp2", {}, "build", {"precision": "bf16-mixed"}),
    (2, "fsdp2", {}, "build_late", {}),
    (2, "fsdp2", {}, "build_averaged", {}),
    (2, "fsdp2", {"cpu_offload": True}, "build", {}),
    (2, "fsdp2", {}, "build_adapted", {"precision": "bf16-true"}),
    (2, "fsdp2", {"context_parallel": 2}, "build_writer", {"per_device_train_batch_size": 2}),
    (2, "tp", {}, "build", {}),
    (1, "single", {}, "build_pair", {"gradient_accumulation_steps": 2}),
    (2, "ddp", {}, "build_pair", {}),
    (2, "fsdp2", {}, "build_pair", {"gradient_accumulation_steps": 2}),
    (4, "ddp", {}, "build", {}),
    (4, "fsdp1", {}, "build", {}),
    (4, "fsdp1", {"replicas": 2}, "build", {}),
    (4, "fsdp2", {}, "build", {}),
    (4, "fsdp2", {"replicas": 2}, "build", {}),
    (4, "fsdp2", {"tensor_parallel": 2}, "build", {}),
    (4, "fsdp2", {"tensor_parallel": 2}, "build", {"precision": "bf16-mixed"}),
    (4, "fsdp2", {"context_parallel": 2}, "build_writer", {"per_device_train_batch_size": 2}),
]


def values_of(strategy: str, options: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """A run as a file of configuration has it."""
    return {"strategy": strategy, **{f"strategy.{name}": value for name, value in options.items()}, **arguments}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "strategy", "options", "build", "arguments"), CASES, ids=str)
def test_a_plan_says_what_a_run_holds_and_sends(
    ranks: dict[int, Ranks],
    tmp_path: Path,
    world: int,
    strategy: str,
    options: dict[str, Any],
    build: str,
    arguments: dict[str, Any],
) -> None:
    target = f"planned_runs:{build}"
    real = ranks[world].run(
        observed, target=target, strategy=strategy, options=options, directory=str(tmp_path), **arguments
    )
    values = values_of(strategy, options, arguments)
    first_and_last = sorted({0, world - 1})
    answers = ranks[1].run(planned, target=target, world=world, ranks=first_and_last, values=values)[0]
    for rank, answer in zip(first_and_last, answers, strict=True):
        check_account(answer, real[rank], rank, OFFLOADED if options.get("cpu_offload") else ())


def check_account(
    answer: dict[str, Any], run: dict[str, Any], rank: int, on_host: Sequence[str] = ()
) -> dict[str, Any]:
    """The account of a rank that was played: it says what the real one held and sent, and had on its host."""
    account: dict[str, Any] | None = answer.get("account")
    assert account is not None, answer
    assert not account["stopped"], account["stopped"]
    assert {name: account[name] for name in HELD} == {name: run[name] for name in HELD}, f"rank {rank}"
    there = {**run, "parameters": run["parameters"] + run["frozen_parameters"]}
    assert account["on_host"] == {kind: there[kind] for kind in (*on_host, *AVERAGES) if there[kind]}
    sent = sorted([row["operation"], row["ranks"], row["count"], row["bytes"]] for row in account["traffic"])
    assert merged(sent) == [list(row) for row in run["sent"]], f"rank {rank}"
    return account


def merged(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows of one operation and group size, added: a run doesn't name the dimensions of its mesh."""
    found: dict[tuple[str, int], list[Any]] = {}
    for operation, size, count, number in rows:
        row = found.setdefault((operation, size), [operation, size, 0, 0])
        row[2] += count
        row[3] += number
    return sorted(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "strategy", "build", "line"),
    [
        (2, "fsdp2", "build_choosing", "made.sum() > 0"),
        (1, "single", "build_choosing_pair", "loss if loss > 0"),
        (2, "fsdp2", "build_choosing_pair", "loss if loss > 0"),
    ],
)
def test_what_cannot_be_played_has_what_a_run_holds(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str, build: str, line: str
) -> None:
    target = f"planned_runs:{build}"
    real = ranks[world].run(observed, target=target, strategy=strategy, options={}, directory=str(tmp_path))
    answers = ranks[1].run(planned, target=target, world=world, ranks=[0], values=values_of(strategy, {}, {}))[0]
    account = answers[0]["account"]
    assert line in account["stopped"]
    assert {name: account[name] for name in HELD} == {name: real[0][name] for name in HELD}
