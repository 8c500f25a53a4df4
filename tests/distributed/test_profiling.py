"""Profilers on real ranks: those that were chosen write, the others do nothing, and nobody waits for anybody."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback, TorchProfiler
from training import Tagger, make_fit, token_rows


class FailOnOne(Callback):
    """Raises on rank 1 alone, in an update that is recorded."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, fit: Any, **context: Any) -> None:
        if state.global_step == 4 and fit.strategy.rank == 1:
            raise ValueError("rank 1 alone")


def profile(output: str, chosen: list[int], strategy: str) -> dict[str, Any]:
    torch.manual_seed(0)
    fit = make_fit(
        Tagger(), token_rows(), token_rows(7), strategy=strategy, output_dir=output, max_steps=8, save_strategy="steps",
        save_steps=5, eval_strategy="steps", eval_steps=4,
        profiler=TorchProfiler(wait=2, warmup=1, active=3, ranks=tuple(chosen)),
    )  # fmt: skip
    fit.train()
    return {"losses": [log["loss"] for log in fit.state.log_history if "loss" in log]}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("chosen", [[0, 1], [1]], ids=str)
def test_chosen_ranks_write(ranks: dict[int, Ranks], tmp_path: Path, chosen: list[int], strategy: str) -> None:
    found = ranks[2].run(profile, output=str(tmp_path), chosen=chosen, strategy=strategy)
    assert found[0] == found[1]
    names = {path.name for path in (tmp_path / "profile").iterdir()}
    first, *others = chosen
    expected = {"phases.json", "table.txt", *(f"trace-rank{rank}-update4.json.gz" for rank in chosen)}
    assert names == expected | {f"{name}-rank{rank}.{end}" for rank in others for name, end in
                                (("phases", "json"), ("table", "txt"))}  # fmt: skip
    for rank in chosen:
        name = "phases.json" if rank == first else f"phases-rank{rank}.json"
        told = json.loads((tmp_path / "profile" / name).read_text())
        assert told["rank"] == rank and told["updates"] == [4, 6]
        phases = told["phases"]
        assert all(phases[p]["seconds"] > 0 for p in ("data", "forward", "backward", "gradients", "optimizer"))
        assert phases["evaluation"]["seconds"] > 0 and phases["saving"]["seconds"] > 0


def test_a_rank_that_is_not_there_is_refused(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    said = ranks[2].run(refusal, output=str(tmp_path))
    assert all("there is no rank 2, ranks are 0 to 1" in each for each in said)


def refusal(output: str) -> str:
    with pytest.raises(ValueError) as caught:
        make_fit(Tagger(), token_rows(), strategy="ddp", output_dir=output, profiler=TorchProfiler(ranks=(2,)))
    return str(caught.value)


def fail_on_one(output: str) -> str:
    fit = make_fit(
        Tagger(), token_rows(), strategy="ddp", output_dir=output, max_steps=8, callbacks=[FailOnOne()],
        profiler=TorchProfiler(wait=2, warmup=1, active=3, ranks=(0, 1)),
    )  # fmt: skip
    with pytest.raises(Exception) as caught:  # each rank has its own
        fit.train()
    assert not torch.autograd._profiler_enabled()
    return type(caught.value).__name__


@pytest.mark.slow
def test_a_rank_that_fails_alone_closes_its_profiler(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):  # the ranks end: one of them was told of the other's failure
        ranks[2].run(fail_on_one, output=str(tmp_path), seconds=60.0)
    told = json.loads((tmp_path / "profile" / "phases-rank1.json").read_text())
    assert told["notes"] == ["The run ended in update 5: ValueError."]
