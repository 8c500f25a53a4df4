"""A resume in which the run's arguments count (``resume_with="arguments"``): its options of the optimizer and of the
schedule, over the checkpoint's moments and counters.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ...strategies.base import Strategy
from ..optim.schedulers import Schedule
from .matching import parameter_groups
from .saved_run import SavedRun
from .trial_step import owners_of

OF_THE_PEAK = ("base_lrs", "min_lrs", "_last_lr")
"""What schedules keep under other names than their constructor's."""


def own_options(strategy: Strategy, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The options of the run's own groups, but for what isn't an option of the constructor: the optimizer's counters.

    Args:
        strategy: its optimizer is as it was made.
        saved: the checkpoint's options for each of its groups.
    """
    found = []
    for owner, group, options in zip(owners_of(strategy), parameter_groups(strategy), saved, strict=True):
        taken = {*inspect.signature(type(owner).__init__).parameters, "lr", "initial_lr"}
        counters = {key: value for key, value in options.items() if key not in taken}
        own = {key: value for key, value in group["options"].items() if key in taken}
        found.append({**own, **counters})
    return found


def own_schedule(scheduler: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a schedule that stands where the saved one does, and has the run's own options.

    Args:
        scheduler: as it was made.
        saved: the checkpoint's state, in the types of the scheduler's.
    """
    taken = {*inspect.signature(type(scheduler).__init__).parameters, *OF_THE_PEAK} - {"last_epoch"}
    own = {key: value for key, value in scheduler.state_dict().items() if key in taken}
    return {**saved, **own}


def own_rates(run: SavedRun, groups: list[dict[str, Any]], state: Mapping[str, Any]) -> list[float]:
    """The learning rate that each group goes on with: where the run's own schedule stands; of a schedule that only
    knows one rate from the one before, the checkpoint's, in proportion to the peaks.

    Args:
        run: its schedule stands where the saved one did.
        groups: the checkpoint's options for each of the optimizer's groups.
        state: see ``checkpoint.read_state``.
    """
    before = state["arguments"].get("learning_rate")
    ratio = run.args.learning_rate / before if before else 1.0
    rates: list[float] = []
    for turn, optimizer in run.optimizers.items():  # their groups are those of the run's optimizer, in this order
        scheduler: Any = run.schedules[turn]
        own = groups[len(rates) : len(rates) + len(optimizer.param_groups)]
        if type(scheduler) in (LambdaLR, Schedule):
            pairs = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
            rates += [float(peak) * shape(scheduler.last_epoch) for shape, peak in pairs]
            continue
        for group, options in zip(optimizer.param_groups, own, strict=True):
            peak, saved_peak = group.get("initial_lr"), options.get("initial_lr")
            rates.append(options["lr"] * (peak / saved_peak if peak is not None and saved_peak else ratio))
    return rates
