"""Options by parameter name on ranks: one device's numbers, by the names that the user's module has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from stratagem import FitArguments
from stratagem.framework.optim.optimizers import make_optimizer
from training import Tagger, make_fit, share_of_16, token_rows

BY_NAME = {
    "embed*": {"learning_rate": 3e-3, "weight_decay": 0.0},
    "blocks.0.*": {"learning_rate_scale": 0.5, "betas": [0.8, 0.9]},
    "blocks.*.down.*": {"weight_decay": 0.3},
}


class ByName(Tagger):
    """A Tagger with the optimizer that the arguments say."""

    def configure_optimizer(self, args: FitArguments) -> torch.optim.Optimizer:
        return make_optimizer(self, args)


def train_by_name(export: str, resume: str | None = None, **arguments: Any) -> list[list[float]]:
    torch.manual_seed(0)
    run = {"max_steps": 6, "weight_decay": 0.1, "optim_args": {"eps": 1e-4}, **arguments}
    fit = make_fit(ByName(), token_rows(), parameter_options=BY_NAME, **run)
    fit.train(resume_from_checkpoint=resume)
    fit.export(export)
    rates = [group["initial_lr"] for group in fit.optimizer.param_groups if group["params"]]
    losses = [log["loss"] for log in fit.state.log_history if "loss" in log]
    fit.close()
    return [losses, sorted(set(rates))]


PLACES = [(2, "ddp"), (2, "fsdp1"), (2, "fsdp2"), (2, "tp"), (2, "deepspeed_stage_2"), (2, "deepspeed_stage_3")]


@pytest.mark.parametrize(("world", "strategy"), PLACES, ids=str)
def test_ranks_give_one_devices_weights_and_resume_to_the_bit(
    ranks: dict[int, Ranks], tmp_path: Path, world: int, strategy: str
) -> None:
    alone, there = str(tmp_path / "alone"), str(tmp_path / "there")
    losses, rates = train_by_name(alone, per_device_train_batch_size=16)
    assert rates == [3e-3, 5e-3, 1e-2]
    run = {"strategy": strategy, "per_device_train_batch_size": share_of_16(strategy, world, {})}
    saves = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "run")}
    found = ranks[world].run(train_by_name, export=there, **run, **saves)
    for each in found:
        assert each[0] == pytest.approx(losses, abs=2e-6) and each[1] == rates
    weights, expected = load_file(there), load_file(alone)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
    again = ranks[world].run(train_by_name, export=there, resume=str(tmp_path / "run" / "checkpoint-3"), **run)
    assert [each[0] for each in again] == [each[0] for each in found]
