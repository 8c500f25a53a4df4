"""Updates that aren't made, on several ranks: decided alike by all, said once, and the same under every strategy."""

import contextlib
import io
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stratagem import Callback, Fit
from stratagem.framework.checkpoint import CheckpointError
from stratagem.framework.run.transaction import SkippedUpdatesError
from torch import Tensor, nn
from training import PLACEMENTS, Tagger, curves, make_fit, share_of_16, token_rows

BAD = 3  # the update with the bad sample
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")


class Gained(Tagger):
    """Multiplies what follows the embedding by the sample's own factor. Given that, a rank can have a NaN alone."""

    def forward(self, tokens: Tensor, gain: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens)) * gain[:, None, None] + self.position[self.order]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rows(*bad: int, gain: float = float("nan"), updates: int = 10) -> list[dict[str, Tensor]]:
    """Of these updates of 16 samples (from 1), the last sample's factor is another: it is the last rank's."""
    found = [{**row, "gain": torch.tensor(1.0)} for row in token_rows(16 * updates)]
    for row in found:
        row["labels"] = (row["tokens"] * 3 + 1) % 11  # all count
    for update in bad:
        found[16 * update - 1]["gain"] = torch.tensor(gain)
    return found


class Frozen(Callback):
    """Notes whether an update moved anything that this rank holds: parameters and the optimizer's state."""

    def __init__(self) -> None:
        self.moved: list[bool] = []

    def held(self, fit: Fit) -> list[Tensor]:
        tensors = dict(fit.strategy.model_state())
        for name, entries in fit.strategy.optimizer_state().items():
            tensors |= {f"{name}/{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors.values()]
        return [tensor.detach().clone() for tensor in local]

    def on_step_begin(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        self.before = self.held(fit)

    def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        after = self.held(fit)
        same = len(after) == len(self.before) and all(map(torch.equal, after, self.before))
        self.moved.append(not same)


def train(
    bad: tuple[int, ...] = (BAD,), gain: float = float("nan"), watch: bool = True, resume: Any = None, **arguments: Any
) -> dict[str, Any]:
    """A run, what it said, and how it ended."""
    torch.manual_seed(0)
    frozen = Frozen()
    quiet = {"max_steps": 8, "shuffle": False, "callbacks": [frozen] if watch else [], "logging_nan_inf_filter": False}
    fit = make_fit(Gained(), rows(*bad, gain=gain, updates=max((10, *bad))), **{**quiet, **arguments})
    said, error = io.StringIO(), ""
    with contextlib.redirect_stderr(said):
        try:
            fit.train(resume_from_checkpoint=resume)
        except (SkippedUpdatesError, CheckpointError) as caught:
            error = f"{type(caught).__name__}: {caught}"
    return {
        **curves(fit), "moved": frozen.moved, "skipped": fit.state.skipped_updates, "error": error,
        "said": said.getvalue(), "updates": fit.state.global_step,
    }  # fmt: skip


def plain_loop(precision: str, clip: float) -> list[float]:
    """The losses in plain torch; the step of the bad update is never asked for."""
    torch.manual_seed(0)
    module = Gained()
    given = make_fit(Tagger(), token_rows(16), learning_rate=0.01).args
    optimizer, made, losses = module.configure_optimizer(given), 0, []
    peaks = [group["lr"] for group in optimizer.param_groups]
    data = rows(BAD)
    for update in range(1, 9):
        batch = {key: torch.stack([row[key] for row in data[16 * (update - 1) : 16 * update]]) for key in data[0]}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.loss(module(batch["tokens"], batch["gain"]), batch)
        losses.append(loss.item())
        module.zero_grad()
        loss.backward()
        if update != BAD:
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - made / 8)
            optimizer.step()
            made += 1
    return losses


def check(results: list[dict[str, Any]], precision: str, clip: float) -> None:
    for found in results:
        assert found["error"] == ""
        assert found["moved"] == [update != BAD for update in range(1, 9)]
        assert found["skipped"] == 1
        nearly = 1e-5 if precision == "32-true" else 0.02
        assert found["loss"] == pytest.approx(plain_loop(precision, clip), rel=nearly, nan_ok=True)
        assert found["loss"] == pytest.approx(results[0]["loss"], rel=0.0, abs=0.0, nan_ok=True)
    said = results[0]["said"]
    assert said.count("was not made") == 1 and f"Update {BAD} was not made" in said
    assert "the positions 32 to 47 in the order of epoch 0: 32, 33, " in said
    assert ("norm is nan" in said or "norm is inf" in said) == bool(clip)  # DeepSpeed tells no NaN from an inf
    assert all("not made" not in found["said"] for found in results[1:])


@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("world", "strategy", "options"), PLACEMENTS, ids=str)
def test_a_bad_sample_of_one_rank_costs_all_one_update(
    ranks: dict[int, Ranks], world: int, strategy: str, options: dict[str, Any], precision: str, clip: float
) -> None:
    share = share_of_16(strategy, world, options)
    found = ranks[world].run(
        train, strategy=strategy, options=options, precision=precision, max_grad_norm=clip,
        per_device_train_batch_size=share,
    )  # fmt: skip
    check(found, precision, clip)
    if strategy in ("ddp", "fsdp1", "fsdp2") and not options:
        assert "the loss isn't finite on rank 1" in found[0]["said"]


@pytest.fixture(scope="module")
def zero_ranks() -> Iterator[Ranks]:
    """Two ranks of their own: the other tests' ranks never import DeepSpeed."""
    found = Ranks(2)
    yield found
    found.end()


@deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_leaves_out_the_same(zero_ranks: Ranks, stage: int, clip: float) -> None:
    arguments = {"strategy": "deepspeed", "options": {"stage": stage}, "max_grad_norm": clip}
    found = zero_ranks.run(train, per_device_train_batch_size=8, **arguments)
    check(found, "32-true", clip)
    assert "the loss isn't finite on rank 1" in found[0]["said"]
    if clip:
        assert "the first gradient in backward that isn't finite is that of 'head.bias'" in found[0]["said"]


class Poison(Callback):
    """The last rank's gradient of a layer that tensor parallelism leaves whole isn't finite, in one update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
        if os.environ["RANK"] == "1" and state.global_step == BAD - 1:
            bias = dict(fit.module.named_parameters())["head.bias"]
            self.hook = bias.register_post_accumulate_grad_hook(lambda p: p.grad.fill_(torch.nan))
        elif hasattr(self, "hook"):
            self.hook.remove()


def train_poisoned(**arguments: Any) -> dict[str, Any]:
    return train(bad=(), callbacks=[Poison()], watch=False, **arguments)


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_ranks_decide_alike_where_one_alone_sees_it(ranks: dict[int, Ranks], clip: float) -> None:
    found = ranks[2].run(train_poisoned, strategy="tp", max_grad_norm=clip, per_device_train_batch_size=16)
    assert [result["skipped"] for result in found] == [1, 1]
    assert found[0]["loss"] == found[1]["loss"]
    assert "that of 'head.bias' on rank 1." in found[0]["said"]


MANY = {"bad": (2, 4, 5, 6, 7), "max_skipped_updates": 4, "watch": False}


def check_end(found: list[dict[str, Any]]) -> None:
    assert found[0]["error"] == found[1]["error"].replace(
        "in the order of epoch 0;", "in the order of epoch 0: 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, "
        "62, 63 of the dataset;",
    )  # fmt: skip
    text = found[0]["error"]
    assert text.startswith("SkippedUpdatesError: The run ends: 4 updates in a row were not made, up to update 7")
    assert "It began so: Update 4 was not made" in text and "'head.bias'" in text
    assert "the positions 48 to 63 in the order of epoch 0" in text
    assert [result["updates"] for result in found] == [7, 7]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tp"])
def test_too_many_in_a_row_name_parameter_and_rank(ranks: dict[int, Ranks], strategy: str) -> None:
    found = ranks[2].run(train, strategy=strategy, per_device_train_batch_size=share_of_16(strategy, 2, {}), **MANY)
    check_end(found)
    assert ("the loss isn't finite on rank 1" in found[0]["error"]) == (strategy != "tp")


@deepspeed
@pytest.mark.slow
def test_too_many_in_a_row_under_zero(zero_ranks: Ranks) -> None:
    found = zero_ranks.run(train, strategy="deepspeed", options={"stage": 2}, per_device_train_batch_size=8, **MANY)
    check_end(found)
    assert "the loss isn't finite on rank 1" in found[0]["error"]


SPIKES: dict[str, Any] = {
    "bad": (56, 60), "gain": 1e4, "max_steps": 60, "spike_updates": 6.0, "max_grad_norm": 1e6, "watch": False,
    "learning_rate": 1e-4,
}  # fmt: skip


def resumed(directory: Path, **arguments: Any) -> list[dict[str, Any]]:
    """A run, and what goes on from between its two spikes."""
    given = {**SPIKES, **arguments, "output_dir": str(directory)}
    whole = train(save_strategy="steps", save_steps=58, **given)
    return [whole, train(resume=directory / "checkpoint-58", **given)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed"])
def test_spikes_are_left_out_and_a_resumed_run_knows_what_was(
    ranks: dict[int, Ranks], zero_ranks: Ranks, tmp_path: Path, strategy: str
) -> None:
    at = zero_ranks if strategy == "deepspeed" else ranks[2]
    results = at.run(resumed, directory=tmp_path, strategy=strategy, per_device_train_batch_size=8)
    assert results[0][0]["loss"] == results[1][0]["loss"]
    whole, again = results[0]
    assert whole["skipped"] == again["skipped"] == 2
    assert whole["said"].count("was not made") == 2 and "6 standard deviations" in whole["said"]
    assert again["said"].count("was not made") == 1
    assert again["loss"][-3:] == whole["loss"][-3:]


def train_spoiled(directory: Path, **arguments: Any) -> dict[str, Any]:
    class Spoil(Callback):
        """One number of rank 1's share of a weight."""

        def on_step_end(self, args: Any, state: Any, control: Any, *, fit: Fit, **context: Any) -> None:
            if state.global_step == 4 and os.environ["RANK"] == "1":
                weight = fit.strategy.named_parameters()["blocks.1.up.weight"]
                with torch.no_grad():
                    local = weight.to_local() if hasattr(weight, "to_local") else weight
                    local.view(-1)[0] = torch.nan

    found = train(
        bad=(), callbacks=[Spoil()], watch=False, save_strategy="steps", save_steps=2, output_dir=str(directory),
        save_total_limit=1, **arguments,
    )  # fmt: skip
    return {**found, "there": sorted(path.name for path in directory.glob("checkpoint-*"))}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_no_rank_saves_what_is_not_finite_on_one(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    for found in ranks[2].run(train_spoiled, directory=tmp_path, strategy=strategy, per_device_train_batch_size=8):
        error = "CheckpointError: rank 1: 'blocks.1.up.weight' hold numbers that aren't finite"
        assert found["error"].startswith(error)
        assert found["there"] == ["checkpoint-2"] and found["updates"] == 4
