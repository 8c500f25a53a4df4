"""A search for the arguments that train the network of digits.py best: 12 trials with pruning, in about two minutes.

    python examples/search.py           # needs scikit-learn, torchmetrics and Optuna

It ends with the held-out loss and accuracy of digits.py's own arguments and of the best that were found, each trained
once more. A search that was interrupted goes on when it is run again.
"""

import argparse
from typing import Any

import torch
from digits import DigitReader, datasets
from stratagem import Fit


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


def parse_options() -> argparse.Namespace:
    """Every option of the search, from the command line."""
    parser = argparse.ArgumentParser(
        description="Search for a digit reader's arguments.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=12, help="in the whole study")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images in each trial")
    parser.add_argument("--strategy", default="single", help="placement on devices")
    parser.add_argument("--output-dir", default="output/search", help="where the study, its runs and logs go")
    parser.add_argument("--seed", type=int, default=0, help="of the split, and of every trial's own seed")
    parser.add_argument("--plot", action="store_true", help="draw history and importance; needs matplotlib")
    return parser.parse_args()


def main() -> None:
    """Train with the default arguments, search, and train with the best."""
    options = parse_options()
    torch.manual_seed(options.seed)
    train, held_out = datasets(options.seed)
    fit = Fit(
        module_init=module_init,
        train_data=train,
        eval_data=held_out,
        strategy=options.strategy,
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=512,
        learning_rate=3e-3,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="no",
        seed=options.seed,
    )
    fit.train()
    before = best_evaluation(fit)
    fit.hyperparameter_search(
        space,
        n_trials=options.trials,
        storage=f"sqlite:///{options.output_dir}/study.db",
        pruner="median",
        plot=options.plot,
    )
    fit.train()
    after = best_evaluation(fit)
    if fit.strategy.is_main:
        for name, found in (("defaults", before), ("best found", after)):
            print(f"{name}: held-out loss {found['eval_loss']:.4f}, accuracy {found['eval_accuracy']:.4f}")


def best_evaluation(fit: Fit) -> dict[str, float]:
    """Of the last run, the evaluation with the lowest loss."""
    return min((log for log in fit.state.log_history if "eval_loss" in log), key=lambda log: log["eval_loss"])


if __name__ == "__main__":
    main()
