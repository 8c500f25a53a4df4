"""A program for test_search.py: a stored search in ``argv[1]`` of ``argv[2]`` trials; prints them as JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import torch
from stratagem import Callback, Fit

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import Regressor, regression_rows


class Slow(Callback):
    """So that there is a middle of a run to be killed in."""

    def on_step_end(self, *args: Any, **context: Any) -> None:
        time.sleep(0.02)


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    fit = Fit(
        Regressor(),
        regression_rows(40),
        regression_rows(16),
        output_dir=str(directory),
        max_steps=12,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        callbacks=[Slow()],
        progress=False,
    )
    found = fit.hyperparameter_search(
        {"learning_rate": optuna.distributions.FloatDistribution(0.001, 0.3, log=True)},
        n_trials=int(sys.argv[2]),
        storage=f"sqlite:///{directory / 'study.db'}",
    )
    keys = ("number", "state", "values", "params", "retry_of")
    trials = [
        {**{key: getattr(trial, key) for key in keys}, "directory": str(trial.directory)} for trial in found.trials
    ]
    print(json.dumps(trials))


if __name__ == "__main__":
    main()
