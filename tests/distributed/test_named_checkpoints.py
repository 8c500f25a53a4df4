"""Named and best checkpoints on real ranks: saved together, spared together, resumed from by name elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback, Fit
from training import Tagger, make_fit, token_rows


class Name(Callback):
    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        if state.global_step == 3:
            fit.save_checkpoint(name="third")


def train(output: str, resume: Any = None, **arguments: Any) -> dict[str, Any]:
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **arguments}
    fit = make_fit(
        Tagger(), token_rows(), token_rows(7), output_dir=output, max_steps=12, save_total_limit=1, save_best_limit=3,
        callbacks=[Name()], **options,
    )  # fmt: skip
    fit.train(resume_from_checkpoint=resume)
    losses = [(log["step"], log["loss"]) for log in fit.state.log_history if "loss" in log]
    return {"losses": losses, "evaluations": fit.state.evaluations}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_named_and_best_ones_stay_and_are_found(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    found = ranks[2].run(train, output=str(tmp_path), strategy=strategy, per_device_train_batch_size=4)
    assert found[0] == found[1]
    evaluations = {int(update): value for update, value in found[0]["evaluations"].items()}
    best = sorted(evaluations, key=lambda update: evaluations[update])[:3]
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == sorted(f"checkpoint-{update}" for update in {3, 12, *best})
    assert json.loads((tmp_path / "checkpoint-3" / "state.json").read_text())["names"] == ["third"]
    resumed = train(str(tmp_path), "third", per_device_train_batch_size=8)  # on one device
    # It was saved before update 3 was logged: the next log is of 3 and 4.
    later = [pair for pair in found[0]["losses"] if pair[0] > 4]
    assert [step for step, _ in resumed["losses"][-8:]] == [step for step, _ in later]
    for (_, mine), (_, theirs) in zip(resumed["losses"][-8:], later, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
