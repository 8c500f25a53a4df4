"""The states that others make and take back: schedule, loss scale, callbacks."""

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..agreement import on_all_ranks
from ..module import TrainModule
from ..optim.schedulers import Schedule
from . import callback_states
from .directory import CheckpointError
from .matching import check_like, convert_like
from .own_options import own_schedule
from .saved_run import SavedRun


def check_parts(run: SavedRun, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a schedule that stands elsewhere than the run, and states of other types than the run's own.

    Raises:
        CheckpointError: names the field.
    """
    file, progress = path / "state.json", state["progress"]
    for name, own in (("scheduler", run.scheduler.state_dict()), ("loss_scaling", run.strategy.precision.state_dict())):
        saved = state[name]
        if not own or (not saved and name == "loss_scaling"):  # of a format without a scale
            continue
        lacking = [key for key in own if key not in saved]
        # Another torch may keep other notes.
        if lacking and (state.get("torch") == torch.__version__ or any(not key.startswith("_") for key in lacking)):
            raise CheckpointError(f"{file}: {name} lacks {', '.join(lacking)}.")
        check_like(file, name, own, saved)
    scale = state["loss_scaling"].get("scale")
    if isinstance(scale, int | float) and not scale > 0:
        raise CheckpointError(f"{file}: loss_scaling.scale is {scale!r}: it is a factor above 0.")
    made = progress["global_step"] - progress["skipped_updates"]
    is_own = type(run.scheduler) is Schedule and type(run.module).configure_scheduler is TrainModule.configure_scheduler
    if is_own and state["scheduler"]["last_epoch"] != made:
        raise CheckpointError(
            f"{file}: scheduler.last_epoch is {state['scheduler']['last_epoch']!r}; progress tells of {made} updates."
        )
    groups = len(run.scheduler.optimizer.param_groups)
    rates = state["scheduler"].get("base_lrs")
    if is_own and len(state["parameter_groups"]) == groups and len(rates) != groups:
        raise CheckpointError(f"{file}: scheduler.base_lrs has {len(rates)} values for {groups} parameter groups.")


def load_parts(run: SavedRun, path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Load the states that others check as they load: schedule, loss scale, callbacks. Where one raises, all are what
    they were. Collective.

    Raises:
        CheckpointError: names the section, and what was raised.
    """
    scheduler, precision, callbacks = run.scheduler, run.strategy.precision, run.callbacks.stateful()
    schedule = convert_like(scheduler.state_dict(), state["scheduler"])
    if run.args.resume_with == "arguments":
        schedule = own_schedule(scheduler, schedule)
    parts: dict[str, tuple[Any, Any]] = {
        "scheduler": (scheduler, schedule),
        "loss_scaling": (precision, state["loss_scaling"]),
    }
    for name, callback in callbacks.items():
        if name in state["callbacks"]:
            parts[f"callbacks.{name}"] = callback, callback_states.join_tensors(state["callbacks"][name], tensors)

    def load() -> None:
        before = []
        for name, (holder, saved) in parts.items():
            try:
                before.append((holder, copy.deepcopy(holder.state_dict())))
                holder.load_state_dict(saved)
            except Exception as error:
                for loaded, earlier in before:
                    with contextlib.suppress(Exception):  # one may refuse its own state, too
                        loaded.load_state_dict(earlier)
                raise CheckpointError(
                    f"{path / 'state.json'}: {name} can't be loaded: {type(error).__name__}: {error}"
                ) from error

    on_all_ranks(run.strategy, load, CheckpointError)
