"""A search with two ranks: one asks, all run the same trials, and pruning, failures and time-outs are agreed."""

import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from ranks import Ranks
from stratagem import Fit
from training import Block, Tagger, make_strategy, token_rows

RATES = [0.03, 0.0001, 0.01, 0.02]
STRATEGIES = {"ddp": {}, "fsdp2": {}}


class Sized(Tagger):
    """Fails on one rank alone, in the middle of a trial."""

    def __init__(self, blocks: int, fails: bool) -> None:
        super().__init__(blocks)
        self.fails, self.calls = fails, 0

    def forward(self, tokens: Any) -> Any:
        self.calls += 1
        if self.fails and self.calls == 3 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("on rank 1")
        return super().forward(tokens)


class Drawn(optuna.pruners.BasePruner):
    """Gives up the second trial at its second evaluation."""

    def prune(self, study: Any, trial: Any) -> bool:
        return trial.number == 1 and trial.last_step == 4


def search(
    strategy: str, options: dict[str, Any], directory: str, failing: int = -1, timeout: float | None = None
) -> dict[str, Any]:
    """What each rank knows of the search."""
    here = os.environ["RANK"] == "0"
    made: list[tuple[int, int]] = []

    def module_init(trial: Any) -> Sized:
        blocks = 1 if trial is None else trial.suggest_int("blocks", 1, 3)
        if trial is not None:
            made.append((trial.number, blocks))
        return Sized(blocks, trial is not None and trial.number == failing)

    def space(trial: Any) -> dict[str, Any]:
        assert here, "only the main process asks"
        rate = RATES[trial.number]
        return {"learning_rate": trial.suggest_float("learning_rate", rate, rate)}

    rows = token_rows()
    fit = Fit(
        None,
        rows[:120],
        rows[120:],
        strategy=make_strategy(strategy, options),
        module_init=module_init,
        output_dir=directory,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        loggers=("jsonl",),
        progress=False,
    )
    found = fit.hyperparameter_search(
        space,
        n_trials=4,
        timeout=timeout,
        storage=f"sqlite:///{directory}/study.db",
        pruner=Drawn(),
        catch=(ZeroDivisionError,),
    )
    steps = []
    if found.best is not None:
        fit.train()
        steps.append(fit.state.global_step)
    return {
        "made": made,
        "states": [trial.state for trial in found.trials],
        "values": [trial.values for trial in found.trials],
        "errors": [trial.error for trial in found.trials],
        "params": [trial.params for trial in found.trials],
        "best": None if found.best is None else (found.best.number, found.best.values[0]),
        "args": fit.args.to_dict(),
        "again": [log["eval_loss"] for log in fit.state.log_history if "eval_loss" in log],
        "blocks": sum(isinstance(layer, Block) for layer in fit.module.modules()),
        "steps": steps,
        "main": found.study is not None,
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_with_pruning_and_a_failure_on_one_rank(
    ranks: dict[int, Ranks], tmp_path: Path, strategy: str
) -> None:
    first, second = ranks[2].run(
        search, strategy=strategy, options=STRATEGIES[strategy], directory=str(tmp_path), failing=2, seconds=120
    )
    assert first["states"] == ["complete", "pruned", "failed", "complete"]
    assert first["errors"][2] == "ZeroDivisionError: on rank 1"
    assert [each["main"] for each in (first, second)] == [True, False]
    assert {**first, "main": None} == {**second, "main": None}  # the same trials, values, module and arguments
    number, value = first["best"]
    assert first["args"]["learning_rate"] == RATES[number] and first["blocks"] == first["params"][number]["blocks"]
    assert min(first["again"]) == value  # train() repeats the best trial, to the bit
    stored = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.state.name for trial in stored.trials] == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE"]
    assert list(stored.trials[1].intermediate_values) == [2, 4]
    assert list(stored.trials[0].intermediate_values) == [2, 4, 6]


@pytest.mark.slow
def test_a_time_out_is_agreed(ranks: dict[int, Ranks], tmp_path: Path) -> None:
    first, second = ranks[2].run(search, strategy="ddp", options={}, directory=str(tmp_path), timeout=1e-6, seconds=60)
    assert first["states"] == second["states"] == [] and first["best"] is second["best"] is None
