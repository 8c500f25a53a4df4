"""The best evaluation of a run, and the checkpoint that belongs to it."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..arguments import FitArguments
from ..fields.cadence import BEST
from ..state import TrainState


def chosen_metric(args: FitArguments, metrics: Mapping[str, float]) -> float:
    """Return the value of the metric that ``metric_for_best_model`` names.

    Raises:
        ValueError: the evaluation didn't produce that metric; the message lists those that it produced.
    """
    if args.best_metric not in metrics:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} asks for {args.best_metric!r}, which the evaluation "
            f"doesn't produce. It produces {', '.join(sorted(metrics))}."
        )
    return metrics[args.best_metric]


def is_better(args: FitArguments, value: float, than: float | None, by: float = 0.0) -> bool:
    """Return whether a value is better than another by more than ``by``. Any value is better than None or NaN."""
    if than is None or math.isnan(than):
        return True
    return value > than + by if args.more_is_better else value < than - by


def note_evaluation(args: FitArguments, state: TrainState, metrics: Mapping[str, float]) -> bool:
    """Note an evaluation in the state. Where no metric was chosen, the loss decides.

    Returns:
        Whether the evaluation is among the ``save_best_limit`` best so far.
    """
    needs_best = args.metric_for_best_model is not None or args.load_best_model_at_end or args.save_strategy == BEST
    if args.best_metric not in metrics and not needs_best:
        return False
    value = chosen_metric(args, metrics)
    as_good = sum(not is_better(args, value, earlier) for earlier in state.evaluations.values())
    state.note_evaluation(value)
    if is_better(args, value, state.best_metric):
        state.note_best(value)
        return True
    return as_good < args.save_best_limit and args.save_best_limit > 1


def best_update(state: TrainState) -> int | None:
    """Return the update of the best evaluation so far; None before the first evaluation."""
    return state.best_global_step if state.best_metric is not None else None


def best_updates(args: FitArguments, state: TrainState) -> list[int]:
    """Return the updates of all evaluations so far, from the best to the worst; of equal ones the earlier first."""

    def badness(update: str) -> tuple[bool, float]:
        value = state.evaluations[update]
        return math.isnan(value), -value if args.more_is_better else value

    ranked = [int(update) for update in sorted(state.evaluations, key=lambda u: (badness(u), int(u)))]
    best = best_update(state)
    return ranked if best is None else [best, *(update for update in ranked if update != best)]


def best_checkpoint(args: FitArguments, update: int | None) -> Path | None:
    """Return the checkpoint of the best evaluation, whose update ``best_update`` returned; None where there is none."""
    path = Path(args.output_dir) / f"checkpoint-{update}"
    return path if update is not None and path.is_dir() else None


def best_checkpoints(args: FitArguments, updates: Sequence[int]) -> list[Path]:
    """Return the checkpoints of the best evaluations that have one, at most ``save_best_limit`` of them.

    Args:
        args: the arguments of the run.
        updates: what ``best_updates`` returned, which with ``async_save`` may have been earlier.
    """
    paths = (Path(args.output_dir) / f"checkpoint-{update}" for update in updates)
    return list(itertools.islice((path for path in paths if path.is_dir()), args.save_best_limit))


def checkpoint_to_load(args: FitArguments, state: TrainState) -> Path | None:
    """Return the checkpoint whose weights a run with ``load_best_model_at_end`` ends with. None leaves the weights as
    they are, with a warning where they aren't the best.
    """
    update = best_update(state)
    path = best_checkpoint(args, update)
    if path is None and (update is None or update != state.global_step):
        why = (
            "no evaluation was made"
            if update is None
            else f"the best evaluation was at update {update}, and there is no "
            f"{Path(args.output_dir) / f'checkpoint-{update}'}"
        )
        warnings.warn(
            f"load_best_model_at_end=True has no effect: {why}. The weights are those of the last update.", stacklevel=3
        )
    return path
