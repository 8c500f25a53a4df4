"""Optimizers from packages on several ranks: the curve of one device, and the resume that changes nothing."""

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import FitArguments
from stratagem.framework.optimizers import make_optimizer
from torch.optim import Optimizer
from training import Tagger, token_rows, train

pytestmark = pytest.mark.slow


class Named(Tagger):
    """The tagger with the optimizer that the arguments name."""

    def configure_optimizer(self, args: FitArguments) -> Optimizer:
        return make_optimizer(self, args)


def run(**options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "module": Named,
        "data": token_rows(40),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 0.003,
        "max_grad_norm": 0.0,
    }
    return train(**{**defaults, **options})


@pytest.mark.parametrize(
    ("optim", "strategy"),
    [
        ("lion", "fsdp1"),
        ("lion", "fsdp2"),
        ("schedule_free_adamw", "ddp"),
        ("schedule_free_adamw", "fsdp1"),
        ("schedule_free_adamw", "fsdp2"),
        ("schedule_free_adamw", "tp"),  # it counts its updates in the groups, which this strategy cuts for a step
        ("adamw_8bit", "ddp"),
    ],
)
def test_the_curve_is_one_devices_and_a_resume_changes_nothing(
    ranks: dict[int, Ranks], tmp_path: Path, optim: str, strategy: str
) -> None:
    expected = run(optim=optim, per_device_train_batch_size=8, output_dir=str(tmp_path / "single"))
    placed = {
        "optim": optim,
        "strategy": strategy,
        "per_device_train_batch_size": 8 if strategy == "tp" else 4,
        "output_dir": str(tmp_path / "ranks"),
    }
    through, resumed = tmp_path / "through.safetensors", tmp_path / "resumed.safetensors"
    [found, _] = ranks[2].run(run, export=through, **placed)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    ranks[2].run(run, export=resumed, resume=str(tmp_path / "ranks" / "checkpoint-3"), **placed)
    weights = load_file(resumed)
    for name, value in load_file(through).items():
        assert weights[name].equal(value), name


def refusal(**options: Any) -> str:
    try:
        run(**options)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2", "tp"])
def test_8_bit_state_of_parts_is_refused(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    for said in ranks[2].run(refusal, optim="adamw_8bit", strategy=strategy, output_dir=str(tmp_path)):
        assert f"AdamW8bit doesn't work under strategy='{strategy}'" in said
        assert "use optim='adamw', or strategy='ddp'" in said
