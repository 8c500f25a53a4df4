"""Reports of a search: a line for each trial, TensorBoard's HParams, a table at the end, and Optuna's pictures."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..printing import console_for_tables, say
from .options import SearchOptions, import_optuna
from .results import SearchOutput, TrialResult


def format_values(trial: TrialResult, objectives: tuple[str, ...]) -> str:
    """Write the values of the objectives of a trial, or why it has none."""
    if trial.values:
        return ", ".join(f"{name} {value:.6g}" for name, value in zip(objectives, trial.values, strict=False))
    return trial.error or ""


def format_parameters(given: dict[str, Any]) -> str:
    """Write parameters on one line."""
    return ", ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in given.items())


def progress_line(trial: TrialResult, output: SearchOutput, options: SearchOptions) -> str:
    """Write the line about a trial that is over, with the best trial so far."""
    finished = sum(each.state in ("complete", "pruned", "failed") for each in output.trials)
    of = "" if options.n_trials is None else f"/{options.n_trials}"
    parts = [
        f"trial {trial.number} ({finished}{of})",
        f"{trial.state} {format_values(trial, output.objectives)}".strip(),
        format_parameters(trial.params),
    ]
    if output.best is not None:
        parts.append(f"best {output.best.values[0]:.6g} (trial {output.best.number})")
    elif output.pareto:
        parts.append(f"{len(output.pareto)} on the Pareto front")
    if trial.seconds is not None:
        parts.append(f"{trial.seconds:.1f} s")
    return " | ".join(part for part in parts if part)


def print_table(output: SearchOutput) -> None:
    """Print a table of all trials, the best first."""
    from rich.table import Table

    names = list(dict.fromkeys(name for trial in output.trials for name in trial.params))
    table = Table(title=f"Search {output.study_name!r}")
    for column in ("trial", "state", *output.objectives, *names, "seconds"):
        table.add_column(column, justify="left" if column == "state" else "right", overflow="fold")
    best = {trial.number for trial in (output.best, *output.pareto) if trial is not None}
    for trial in sorted(output.trials, key=lambda each: (each.number not in best, each.number)):
        numbers = [f"{value:.6g}" for value in trial.values] or [""] * len(output.objectives)
        table.add_row(
            str(trial.number),
            trial.state,
            *(numbers + [""] * len(output.objectives))[: len(output.objectives)],
            *(format_parameters({"": trial.params[name]})[1:] if name in trial.params else "" for name in names),
            "" if trial.seconds is None else f"{trial.seconds:.1f}",
            style="bold" if trial.number in best else None,
        )
    console = console_for_tables(width=160)
    with console.capture() as drawn:
        console.print(table)
    say(drawn.get().rstrip("\n"))


def write_hparams(trial: TrialResult, objectives: tuple[str, ...]) -> None:
    """Write the parameters and objectives of a trial beside its curves, for the HParams page of TensorBoard, where that
    is installed.
    """
    if find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    assert trial.directory is not None
    plain = {n: v if isinstance(v, bool | int | float | str) else repr(v) for n, v in trial.params.items()}
    with SummaryWriter(str(trial.directory / "search")) as writer:
        metrics = {f"objective/{name}": value for name, value in zip(objectives, trial.values, strict=False)}
        writer.add_hparams(plain, metrics, run_name=".")


def draw_pictures(study: Any, output: SearchOutput, directory: Path) -> list[Path]:
    """Draw the history of the objectives and the importance of the parameters with Optuna, as PNG files in a directory.

    A picture that would show nothing (the importance of parameters in fewer than two completed trials) isn't drawn.
    """
    import warnings

    import matplotlib

    optuna = import_optuna()
    drawn = []
    completed = [trial for trial in output.trials if trial.state == "complete"]
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # all of Optuna's matplotlib functions give this warning
        before = matplotlib.get_backend()
        matplotlib.use("Agg")  # this backend opens no window, and needs no display
        from matplotlib import pyplot

        for index, name in enumerate(output.objectives):
            several = len(output.objectives) > 1

            def target(trial: Any, index: int = index) -> float:
                return trial.values[index]

            chosen: dict[str, Any] = {"target": target if several else None, "target_name": name}
            pictures = {"history": optuna.visualization.matplotlib.plot_optimization_history(study, **chosen)}
            if len(completed) > 1 and len({repr(trial.params) for trial in completed}) > 1:
                pictures["importance"] = optuna.visualization.matplotlib.plot_param_importances(
                    study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(), **chosen
                )
            for kind, axes in pictures.items():
                path = directory / (f"{kind}-{name}.png" if several else f"{kind}.png")
                axes.figure.savefig(path, bbox_inches="tight")
                pyplot.close(axes.figure)
                drawn.append(path)
        matplotlib.use(before)
    return drawn
