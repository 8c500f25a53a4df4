"""Optimizers from packages on several ranks: the curve of one device, and the resume that changes nothing."""

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import FitArguments, TrainModule
from stratagem.framework.combinations import check_combination
from stratagem.framework.optim.optimizers import LOW_RANK, make_optimizer
from torch.optim import Optimizer
from training import Tagger, make_strategy, token_rows, train

pytestmark = pytest.mark.slow


class Named(Tagger):
    """The tagger with the optimizer that the arguments name."""

    def configure_optimizer(self, args: FitArguments) -> Optimizer:
        return make_optimizer(self, args)


PROJECTED = {"optim_target_modules": "all-linear", "optim_args": {"rank": 4}}


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
        ("stable_adamw", "fsdp2"),
        ("grokadamw", "ddp"),
        ("schedule_free_radam", "fsdp2"),
        ("schedule_free_sgd", "fsdp1"),
        ("galore_adamw", "ddp"),
        ("apollo_adamw", "ddp"),
        ("torch.optim.NAdam", "fsdp2"),
    ],
)
def test_the_curve_is_one_devices_and_a_resume_changes_nothing(
    ranks: dict[int, Ranks], tmp_path: Path, optim: str, strategy: str
) -> None:
    own = PROJECTED if optim in LOW_RANK else {}
    expected = run(optim=optim, per_device_train_batch_size=8, output_dir=str(tmp_path / "single"), **own)
    placed = {
        **own,
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


@pytest.mark.parametrize(
    ("optim", "strategy"),
    [("stable_adamw", "fsdp1"), ("grokadamw", "fsdp2"), ("galore_adamw", "fsdp2"), ("apollo_adamw", "fsdp1")]
    + [(name, "fsdp2") for name in ("ademamix", "lion_32bit", "lion_8bit", "rmsprop_bnb")]
    + [(name, "fsdp1") for name in ("ademamix", "lion_32bit", "lion_8bit", "rmsprop_bnb_8bit")],
)
def test_what_shards_cant_be_stepped_with_is_refused_by_name(optim: str, strategy: str, tmp_path: Path) -> None:
    args = FitArguments(optim=optim, **(PROJECTED if optim in LOW_RANK else {}))
    placed = make_strategy(strategy)
    with pytest.raises(
        ValueError, match=f"optim='{optim}': doesn't work under strategy='{strategy}'.*strategy='|optim="
    ):
        check_combination(args, placed, Plain(), None, None)


class Plain(Tagger):
    """The tagger with the library's own configure_optimizer."""

    configure_optimizer = TrainModule.configure_optimizer


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2", "tp"])
def test_8_bit_state_of_parts_is_refused(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    for said in ranks[2].run(refusal, optim="adamw_8bit", strategy=strategy, output_dir=str(tmp_path)):
        assert f"AdamW8bit doesn't work under strategy='{strategy}'" in said
        assert "use optim='adamw', or strategy='ddp'" in said
