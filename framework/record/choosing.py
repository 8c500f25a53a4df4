"""Which charts a run's curves make: losses together, then norm, learning rate, rates, memory, metrics, the rest."""

from collections.abc import Callable, Mapping, Sequence

from .charts import Chart, Line
from .curves import Curve
from .formats import words
from .history import History

POINTS = 24_000  # of all curves on a page together: the page stays below a megabyte
MOST_OF_A_CURVE = 800
MOST_CHARTS = 60
FEW, FEW_OF_EVALUATIONS = 20, 60  # points, up to which each is marked

Named = Mapping[str, Curve]


def is_loss(name: str) -> bool:
    """Whether a name is that of the loss, in training or evaluation."""
    return name == "loss" or (name.startswith("eval_") and name.endswith("_loss"))


def is_rate(name: str) -> bool:
    """Whether a name is that of a rate."""
    return name.endswith("_per_second")


# What belongs together, in the order of the page: (title, which names, unit, note).
GROUPS: Sequence[tuple[str, Callable[[str], bool], str, str]] = (
    ("Loss", is_loss, "", ""),
    ("Gradient norm", lambda name: name.startswith("grad_norm"), "", "before clipping"),
    ("Learning rate", lambda name: name.startswith("learning_rate"), "", ""),
    ("Updates a second", lambda name: name == "updates_per_second", "", "by the clock, between two logs"),
    ("Memory", lambda name: name.startswith("memory_"), "bytes", "of the main process"),
    ("Waiting for data", lambda name: name == WAITING, "", "% of the time, on the rank where it is longest"),
    ("Slowest rank", lambda name: name == "slowest_rank_ratio", "", "its own time, relative to the ranks' median"),
)
NOT_DRAWN = ("data_wait_seconds", "slowest_rank")  # a share is drawn instead; a number of a rank is no curve
WAITING = "data_wait_percent"


def charts_of(runs: Mapping[str, History]) -> tuple[list[Chart], list[Chart], list[str]]:
    """Make the charts of a run, or of several over one another.

    Args:
        runs: by the name that a legend shows; of one run, it isn't shown.

    Returns:
        (main ones, others, names that were left out because there are too many).
    """
    curves = {run: with_shares(history) for run, history in runs.items()}
    names = list(dict.fromkeys(name for named in curves.values() for name in named))
    names = [name for name in names if name not in NOT_DRAWN]
    groups = [(title, [name for name in names if belongs(name)], unit, note) for title, belongs, unit, note in GROUPS]
    taken = {name for _, members, _, _ in groups for name in members}
    metrics = [name for name in names if name.startswith("eval_") and name not in taken]
    rates = [name for name in names if is_rate(name) and name not in taken and name not in metrics]
    rest = [name for name in names if name not in taken and name not in metrics and name not in rates]
    groups[4:4] = [(words(name).capitalize(), [name], "", "") for name in rates]
    groups[1:1] = [(words(name).capitalize(), [name], "", "") for name in metrics]
    others = [(words(name), [name], "", "") for name in rest]
    room = max(0, MOST_CHARTS - len(groups))
    left_out = [title for title, *_ in others[room:]]
    many = sum(len(members) for _, members, _, _ in [*groups, *others[:room]]) * len(runs)
    points = max(20, min(MOST_OF_A_CURVE, POINTS // max(1, many)))
    marks = resumed_at(next(iter(runs.values()))) if len(runs) == 1 else []
    main = [made for group in groups[:MOST_CHARTS] if (made := chart_of(*group, curves, points, marks))]
    return main, [made for group in others[:room] if (made := chart_of(*group, curves, points, marks))], left_out


def chart_of(
    title: str, names: Sequence[str], unit: str, note: str, runs: Mapping[str, Named], points: int,
    marks: Sequence[float],
) -> Chart | None:  # fmt: skip
    """One chart; None where no run has such a curve. Each run has a color, or, where there is one run, each name."""
    lines: list[Line] = []
    for place, (run, curves) in enumerate(runs.items()):
        for name in names:
            if name in curves and curves[name].finite:
                steps, values = curves[name].thinned(points)
                shown = line_name(name, names, run, len(runs))
                color = place if len(runs) > 1 else len(lines)
                is_few = len(steps) <= (FEW_OF_EVALUATIONS if name.startswith("eval_") else FEW)
                is_faint = len(runs) > 1 and name == "loss" and "eval_loss" in curves
                lines.append(Line(shown, steps, values, color, is_few, is_faint))
    if not lines:
        return None
    nonfinite = sum(curves[name].nonfinite for curves in runs.values() for name in names if name in curves)
    gaps = f"{nonfinite} values weren't finite" if nonfinite else ""
    return Chart(title, lines, unit, "; ".join(filter(None, (note, gaps))), marks, title == "Loss")


def line_name(name: str, names: Sequence[str], run: str, runs: int) -> str:
    """What the legend calls a curve."""
    plain = {"loss": "train", "eval_loss": "evaluation"}.get(name, words(name.removeprefix("memory_")))
    if runs == 1:
        return plain
    return run if len(names) == 1 else f"{run} · {plain}"


def with_shares(history: History) -> Named:
    """A run's curves, with the percentage of the time that is spent waiting for data, where the log tells seconds."""
    waiting, rates = history.curves.get("data_wait_seconds"), history.curves.get("updates_per_second")
    if waiting is None or rates is None:
        return history.curves
    by_step = dict(zip(rates.steps, rates.values, strict=True))
    shares = Curve()
    for step, seconds in zip(*waiting.thinned(MOST_OF_A_CURVE), strict=True):
        rate = by_step.get(step)
        if seconds is not None and rate is not None:
            shares.add(step, 100 * min(1.0, seconds * rate))
    return {**history.curves, WAITING: shares}


def resumed_at(history: History) -> list[float]:
    """The updates at which the run went on after an end, the last hundred."""
    return [float(session.update) for session in history.sessions[1:]][-100:]
