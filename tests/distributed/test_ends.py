"""What ends a run on several ranks, or on one of them: saved together or not at all, and nothing is left behind."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Ranks
from stratagem import Callback, Fit
from torch import nn
from training import Tagger, curves, make_fit, make_strategy, token_rows

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 100, "max_steps": 6, "save_on_exception": True}


class Fails(Callback):
    """Raises after some updates on some ranks."""

    def __init__(self, step: int, on: list[int]) -> None:
        self.step = step
        self.is_here = int(os.environ["RANK"]) in on

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if self.is_here and state.global_step == self.step:
            raise ZeroDivisionError("in a callback")


class FailsInEvaluation(Tagger):
    """Raises in the middle of a forward in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_pre_hook(fail_in_evaluation)


def fail_in_evaluation(block: nn.Module, args: Any) -> None:
    if not block.training:
        raise ZeroDivisionError("in forward")


def failing_run(strategy: str, directory: str, on: list[int]) -> list[str]:
    fit = make_fit(Tagger(), token_rows(), strategy=strategy, callbacks=[Fails(3, on)], output_dir=directory, **SAVES)
    with pytest.raises(ZeroDivisionError, match="in a callback"):
        fit.train()
    return sorted(path.name for path in Path(directory).glob("checkpoint-*"))


def failing_evaluation(strategy: str, directory: str) -> list[str]:
    fit = make_fit(
        FailsInEvaluation(), token_rows(), token_rows()[:8], strategy=strategy, output_dir=directory,
        eval_strategy="steps", eval_steps=3, **SAVES,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError, match="in forward"):
        fit.train()
    return sorted(path.name for path in Path(directory).glob("checkpoint-*"))


def whole_run(strategy: str, directory: str | None) -> dict[str, Any]:
    """A run, or the rest of one that was saved."""
    options = {"output_dir": directory} if directory else {}
    fit = make_fit(Tagger(), token_rows(), strategy=strategy, max_steps=6, **options)
    fit.train(resume_from_checkpoint=bool(directory))
    return curves(fit)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_an_exception_on_all_ranks_is_saved_on_all(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    for found in ranks[2].run(failing_run, strategy=strategy, directory=str(tmp_path), on=[0, 1]):
        assert found == ["checkpoint-3"]
    expected = ranks[2].run(whole_run, strategy=strategy, directory=None)
    for rank, found in enumerate(ranks[2].run(whole_run, strategy=strategy, directory=str(tmp_path))):
        # The log of update 3 was due after the exception: its loss is in that of update 4.
        assert found["loss"][-2:] == expected[rank]["loss"][-2:]
        assert found["loss"][-3] == pytest.approx(sum(expected[rank]["loss"][2:4]) / 2)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_forward_that_fails_in_an_evaluation(ranks: dict[int, Ranks], tmp_path: Path, strategy: str) -> None:
    for found in ranks[2].run(failing_evaluation, strategy=strategy, directory=str(tmp_path)):
        assert found == ["checkpoint-3"]
    expected = ranks[2].run(whole_run, strategy=strategy, directory=None)
    found = ranks[2].run(whole_run, strategy=strategy, directory=str(tmp_path))
    assert found[0]["loss"][-3:] == expected[0]["loss"][-3:]


def many_fits(directory: str) -> list[tuple[int, int]]:
    """Threads and process groups after each of some Fits that save in the background."""
    counts = []
    for index in range(5):
        fit = make_fit(
            Tagger(1), token_rows(16), strategy="ddp", max_steps=2, save_strategy="steps", save_steps=1,
            async_save=True, output_dir=f"{directory}/{index}",
        )  # fmt: skip
        fit.train()
        counts.append((threading.active_count(), len(dist.distributed_c10d._world.pg_map)))
    return counts


def test_saving_in_the_background_leaves_no_thread_and_no_group(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    for counts in ranks[2].run(many_fits, directory=str(tmp_path)):
        assert counts == [counts[0]] * 5
    assert len(list(tmp_path.glob("*/checkpoint-2/manifest.json"))) == 5


def searches(directory: str, strategy: str, keeps: bool) -> list[list[Any]]:
    """Two searches in one process, in the first trial of the second of which rank 1 raises."""
    raised: list[int] = []

    class Once(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 2 and os.environ["RANK"] == "1" and not raised:
                raised.append(1)
                raise RuntimeError("on rank 1")

    def search(name: str, callbacks: list[Callback]) -> tuple[Any, list[Any]]:
        fit = Fit(
            None, token_rows()[:40], token_rows()[40:56], strategy=make_strategy(strategy, {}), max_steps=3,
            module_init=lambda trial: Tagger(1), output_dir=f"{directory}/{name}", save_strategy="no", loggers=(),
            progress=False, callbacks=callbacks,
        )  # fmt: skip
        found = fit.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1)},
            n_trials=2, catch=(RuntimeError,),
        )  # fmt: skip
        return fit, [(trial.state, trial.error) for trial in found.trials]

    kept = []
    if keeps:  # a Fit that was trained, and that somebody still holds
        kept.append(make_fit(Tagger(1), token_rows(16), strategy=strategy, max_steps=2))
        kept[0].train()
    first, states = search("first", [])
    if keeps:
        kept.append(first)
    del first
    return [states, search("second", [Once()])[1]]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "keeps"), [("ddp", False), ("ddp", True), ("fsdp2", True)])
def test_a_rank_that_fails_in_a_later_search_ends_the_trial_on_both(tmp_path: Path, strategy: str, keeps: bool) -> None:
    world = Ranks(2)  # of its own: in a process in which Optuna wasn't imported yet
    try:
        found = world.run(searches, directory=str(tmp_path), strategy=strategy, keeps=keeps, seconds=120)
    finally:
        world.end()
    for first, second in found:
        assert first == [("complete", None)] * 2
        assert second == [("failed", "RuntimeError: on rank 1"), ("complete", None)]
