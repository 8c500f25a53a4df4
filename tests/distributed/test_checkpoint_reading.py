"""Checkpoints of several ranks: what one rank would refuse, all refuse; states and callbacks of ranks stay apart."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import forging
import pytest
import torch
from ranks import Ranks
from stratagem import Callback
from stratagem.framework.checkpoint import CheckpointError
from torch import Tensor
from torch.distributed.tensor import DTensor
from training import Tagger, make_fit, token_rows

pytestmark = pytest.mark.slow

SAVED_AT = 2


class Average(Callback):
    """A moving average of the weights, sharded as they are."""

    def __init__(self) -> None:
        self.shadow: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, fit: Any, **context: Any) -> None:
        with torch.no_grad():
            for name, parameter in fit.strategy.model_state().items():
                if parameter.is_floating_point():
                    mine = self.shadow.setdefault(name, parameter.detach().clone())
                    mine.lerp_(parameter.detach(), 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


def averaged(directory: str, strategy: str, resume: str | None = None, only_first: bool = False) -> dict[str, Any]:
    """A run with a moving average: its sums, whether they are sharded, or what it was refused with."""
    average = Average()
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    fit = make_fit(
        Tagger(),
        token_rows(),
        strategy=strategy,
        output_dir=directory,
        max_steps=SAVED_AT + 2,
        save_strategy="steps",
        save_steps=SAVED_AT,
        per_device_train_batch_size=4,
        callbacks=[average] if rank == 0 or not only_first else [],
    )
    try:
        fit.train(resume_from_checkpoint=resume)
    except CheckpointError as error:
        return {"refused": str(error), "optimizer": len(fit.optimizer.state) if fit.placed else 0}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in average.shadow.items()}
    return {
        "average": {name: tensor.double().sum().item() for name, tensor in whole.items()},
        "sharded": [isinstance(tensor, DTensor) for tensor in average.shadow.values()],
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_moving_average_comes_back_as_it_was(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    uninterrupted = ranks[2].run(averaged, directory=str(tmp_path), strategy=strategy)
    path = str(tmp_path / f"checkpoint-{SAVED_AT}")
    resumed = ranks[2].run(averaged, directory=str(tmp_path / "again"), strategy=strategy, resume=path)
    assert resumed == uninterrupted
    assert any(resumed[0]["sharded"]) == (strategy == "fsdp2")


def test_a_callback_may_be_on_one_rank_alone(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    given = {"strategy": "ddp", "only_first": True}
    uninterrupted = ranks[2].run(averaged, directory=str(tmp_path), **given)
    path = str(tmp_path / f"checkpoint-{SAVED_AT}")
    assert ranks[2].run(averaged, directory=str(tmp_path / "again"), resume=path, **given) == uninterrupted
    assert uninterrupted[1]["average"] == {}


def test_a_checkpoint_of_two_ranks_over_one_of_four_is_no_mixture(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    for world in (4, 2):
        ranks[world].run(averaged, directory=str(tmp_path / str(world)), strategy="fsdp2")
    of_four, of_two = (tmp_path / str(world) / f"checkpoint-{SAVED_AT}" for world in (4, 2))
    shutil.copytree(of_two, of_four, dirs_exist_ok=True)
    for outcome in ranks[4].run(averaged, directory=str(tmp_path / "out"), strategy="fsdp2", resume=str(of_four)):
        assert "holds files that its manifest.json doesn't list" in outcome["refused"]
        assert "shard-00004" in outcome["refused"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_a_forged_moment_is_refused_on_every_rank(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    ranks[2].run(averaged, directory=str(tmp_path), strategy="ddp")
    path = tmp_path / f"checkpoint-{SAVED_AT}"
    for file in sorted((path / "optimizer").iterdir()):
        tensors = forging.load_file(file)
        for key in [key for key in tensors if key.endswith("up.weight/exp_avg")]:
            tensors[key] = tensors[key][:1].clone()
        offsets = json.dumps({name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in tensors.items()})
        forging.save_file(tensors, file, {"format": "pt", "DCP_SHARDING_INFO": offsets})

    def listed(state: dict[str, Any]) -> None:
        for key, entry in state["optimizer"].items():
            if key.endswith("up.weight/exp_avg"):
                entry["shape"][0] = 1

    forging.change_state(path, listed)
    for outcome in ranks[2].run(averaged, directory=str(tmp_path / "out"), strategy=strategy, resume=str(path)):
        assert "up.weight/exp_avg has the shape (1, 6)" in outcome["refused"]
        assert "(24, 6)" in outcome["refused"]
        assert outcome["optimizer"] == 0
