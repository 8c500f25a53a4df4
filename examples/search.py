"""A search for the arguments that train the network of digits.py best: 12 trials with pruning, in about two minutes.

    python examples/search.py           # needs scikit-learn, torchmetrics and Optuna

It ends with a table: digits.py's own arguments and the best that were found, with the held-out loss and accuracy of
each. A search that was interrupted goes on when it is run again.
"""

from typing import Any

from digits import DigitReader, data
from stratagem import Fit, configure


def module_init(trial: Any) -> DigitReader:
    """A network for each trial, which chooses its width too."""
    return DigitReader(32 if trial is None else trial.suggest_categorical("width", [16, 32, 48]))


def space(trial: Any) -> dict[str, Any]:
    """What is searched for, by the names of FitArguments."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [16, 32, 64]),
        "lr_scheduler_type": trial.suggest_categorical("lr_scheduler_type", ["linear", "cosine"]),
    }


def build() -> dict[str, Any]:
    """What Fit is given beside its options."""
    return {"module_init": module_init}


def search(fit: Fit, /, trials: int = 12, plot: bool = False) -> None:
    """Search.

    Args:
        fit: what trains the trials; it has the best one's arguments afterwards.
        trials: in the whole study.
        plot: draw history and importance; needs matplotlib.
    """
    storage = f"sqlite:///{fit.args.output_dir}/study.db"
    fit.hyperparameter_search(space, n_trials=trials, storage=storage, pruner="median", plot=plot)


ARGUMENTS = {
    "output_dir": "output/search",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 512,
    "learning_rate": 3e-3,
    "logging_strategy": "epoch",
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "seed": 0,
}
"""What Fit is given, unless the command line or a file says otherwise."""


def main() -> None:
    """Train with the default arguments, search, and train with the best."""
    run = configure(build, data, ARGUMENTS, search=search)
    fit = Fit.from_config(run)
    fit.train()
    table = ["  arguments   held-out loss   accuracy", row("defaults", fit)]
    search(fit, **run.own["search"])
    fit.train()
    table.append(row("best found", fit))
    if fit.strategy.is_main:
        print("\n".join(table))


def row(name: str, fit: Fit) -> str:
    """A row of the table: of the last run, the evaluation with the lowest loss."""
    best = min((log for log in fit.state.log_history if "eval_loss" in log), key=lambda log: log["eval_loss"])
    return f"{name:>11} {best['eval_loss']:15.4f} {best['eval_accuracy']:10.4f}"


if __name__ == "__main__":
    main()
