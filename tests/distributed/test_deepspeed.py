"""ZeRO by DeepSpeed: the curve of one device at every stage, and checkpoints that go in and out of it."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
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
