"""ZeRO by DeepSpeed: the curve of one device at every stage, and checkpoints that go in and out of it."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from test_resharding import contents, continue_each
from test_strategies import single
from training import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
]
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def zero_ranks() -> Iterator[Ranks]:
    """Two ranks of their own: the other tests' ranks never import DeepSpeed."""
    ranks = Ranks(2)
    yield ranks
    ranks.end()


def run(ranks: Ranks, stage: int, job: Any = train, options: Any = None, **arguments: Any) -> list[Any]:
    """A job on two ranks, with 16 samples an update."""
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **arguments}
    return ranks.run(job, strategy="deepspeed", options={"stage": stage, **(options or {})}, **given)


@pytest.mark.parametrize("stage", STAGES)
def test_float32_curves(zero_ranks: Ranks, tmp_path: Path, stage: int) -> None:
    expected, expected_weights = single()
    found = run(zero_ranks, stage, export=tmp_path / "weights.safetensors")
    assert found == [found[0]] * 2
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert found[0]["learning_rate"] == expected["learning_rate"]
    weights = load_file(tmp_path / "weights.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-5, atol=1e-5)


# Checkpoints.

SAVED_AT = 8  # of 20 updates, in the middle of an epoch


@pytest.fixture(scope="module")
def saved(ranks: dict[int, Ranks], zero_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint after 8 updates by each stage, and by strategies that know nothing of DeepSpeed."""
    outputs = {name: tmp_path_factory.mktemp(name) for name in ("single", "ddp", "fsdp2", *map(str, STAGES))}

    def saving(name: str) -> dict[str, Any]:
        return {"save_strategy": "steps", "save_steps": SAVED_AT, "output_dir": str(outputs[name])}

    train(per_device_train_batch_size=8, gradient_accumulation_steps=2, **saving("single"))
    for name in ("ddp", "fsdp2"):
        ranks[2].run(train, strategy=name, per_device_train_batch_size=4, gradient_accumulation_steps=2, **saving(name))
    for stage in STAGES:
        run(zero_ranks, stage, export=outputs[str(stage)] / "end.safetensors", **saving(str(stage)))
    return {name: output / f"checkpoint-{SAVED_AT}" for name, output in outputs.items()}


def check_continued(found: dict[str, list[Any]]) -> None:
    """A continued run is one device's, to the end."""
    expected, _ = single()
    assert len(found["loss"]) == 20
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert found["learning_rate"] == expected["learning_rate"]


@pytest.mark.parametrize("stage", STAGES)
def test_zero_continues_any_checkpoint(zero_ranks: Ranks, saved: dict[str, Path], tmp_path: Path, stage: int) -> None:
    results = run(zero_ranks, stage, continue_each, paths=saved, directory=tmp_path)
    assert results[0] == results[1]
    for found in results[0].values():
        check_continued(found)
    # Its own, at the same stage and world: bit for bit the run that wasn't interrupted.
    whole, continued = (
        load_file(p) for p in (saved[str(stage)].parent / "end.safetensors", tmp_path / f"{stage}.safetensors")
    )
    for name, weight in whole.items():
        assert torch.equal(continued[name], weight), name


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_others_continue_zero(ranks: dict[int, Ranks], saved: dict[str, Path], tmp_path: Path, strategy: str) -> None:
    paths = {name: path for name, path in saved.items() if name.isdigit()}
    given = {"paths": paths, "directory": tmp_path, "strategy": strategy}
    if strategy == "single":
        results = [continue_each(per_device_train_batch_size=8, gradient_accumulation_steps=2, **given)]
    else:
        results = ranks[2].run(continue_each, per_device_train_batch_size=4, gradient_accumulation_steps=2, **given)
    for found in results[0].values():
        check_continued(found)


def test_files_have_one_format(saved: dict[str, Path]) -> None:
    expected = contents(saved["single"])
    for name in map(str, STAGES):
        found = contents(saved[name])
        assert found.keys() == expected.keys(), name
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
        assert {file.suffix for file in saved[name].rglob("*") if file.is_file()} == {".json", ".safetensors"}
        sizes = [sum(f.stat().st_size for f in saved[name].glob(f"*/shard-0000{rank}-*")) for rank in (1, 2)]
        assert name == "0" or max(sizes) < 2 * min(sizes)  # each rank wrote its rows
