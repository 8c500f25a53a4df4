"""A run that was stopped and resumed is the run that went on, to the last bit: losses, weights and buffers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from training import Tagger, train

UPDATES, SAVED_AT = 8, 3


def stop_and_resume(directory: str, **arguments: Any) -> dict[str, list[float]]:
    """The losses of a whole run, and of one that goes on from its third update; the weights go to files."""
    run = {"max_steps": UPDATES, "per_device_train_batch_size": 4, "module": Tagger, **arguments}
    saving = {"output_dir": directory, "save_strategy": "steps", "save_steps": SAVED_AT}
    whole = train(**run, **saving, export=f"{directory}/whole.safetensors")
    resumed = train(**run, resume=f"{directory}/checkpoint-{SAVED_AT}", export=f"{directory}/resumed.safetensors")
    return {"whole": whole["loss"], "resumed": resumed["loss"]}


def check(ranks: dict[int, Ranks], world: int, directory: Path, **arguments: Any) -> None:
    """Both runs have the same numbers, on every rank, and the same weights."""
    found = ranks[world].run(stop_and_resume, directory=str(directory), **arguments)
    assert found == [found[0]] * world
    assert len(found[0]["whole"]) == UPDATES
    assert found[0]["resumed"] == found[0]["whole"]
    whole, resumed = (load_file(directory / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


# Two ranks add in either order to the same sum: more are needed to see one. A gradient's place in a bucket tells, so
# one bucket for all and several of them.
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (3, {"bucket_cap_mb": 0.0005}),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(3, {"static_graph": True}, marks=pytest.mark.slow),
        pytest.param(3, {"find_unused_parameters": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ddp_on_more_than_two_ranks(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, options: dict[str, Any]
) -> None:
    check(ranks, world, tmp_path, strategy="ddp", options=options)


OTHERS = ["fsdp1", "fsdp2", "tp", *(f"deepspeed_stage_{stage}" for stage in range(4))]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OTHERS)
def test_the_other_strategies_on_three_ranks(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    check(ranks, 3, tmp_path, strategy=strategy, gradient_accumulation_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"), [("fsdp2", {"replicas": 2}), ("fsdp2", {"tensor_parallel": 2})], ids=str
)
def test_two_dimensions(ranks: dict[int, Ranks], tmp_path: Path, strategy: str, options: dict[str, Any]) -> None:
    check(ranks, 4, tmp_path, strategy=strategy, options=options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision"), [("ddp", "16-mixed"), ("fsdp1", "bf16-mixed"), ("fsdp2", "16-mixed")]
)
def test_sixteen_bits(ranks: dict[int, Ranks], tmp_path: Path, strategy: str, precision: str) -> None:
    check(ranks, 3, tmp_path, strategy=strategy, precision=precision)
