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
    schedules = [(name, run.schedules[turn].state_dict(), saved) for turn, name, saved in saved_schedules(state)]
    for name, own, saved in (*schedules, ("loss_scaling", run.strategy.precision.state_dict(), state["loss_scaling"])):
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
    names_one = type(run.module).configure_scheduler is TrainModule.configure_scheduler
    same_groups = len(state["parameter_groups"]) == sum(len(each.param_groups) for each in run.optimizers.values())
    for turn, name, saved in saved_schedules(state):
        scheduler = run.schedules[turn]
        if not names_one or type(scheduler) is not Schedule:
            continue
        if turn:
            made = progress["global_step"] - state["turns"]["steppings"][turn]["skipped_rounds"]
        if saved["last_epoch"] != made:
            raise CheckpointError(
                f"{file}: {name}.last_epoch is {saved['last_epoch']!r}; progress tells of {made} updates."
            )
        groups, rates = len(scheduler.optimizer.param_groups), saved.get("base_lrs")
        if same_groups and len(rates) != groups:
            raise CheckpointError(f"{file}: {name}.base_lrs has {len(rates)} values for {groups} parameter groups.")


def check_turns(run: SavedRun, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run whose module had other turns.

    Raises:
        CheckpointError: names the turns of both.
    """
    saved, own = [turn for turn, _, _ in saved_schedules(state)], list(run.schedules)
    if set(saved) != set(own):

        def said(turns: list[str]) -> str:
            return f"has the turns {', '.join(turns)}" if turns != [""] else "has none"

        raise CheckpointError(
            f"{path} was saved by a run in other turns: the checkpoint {said(saved)}, and this run's module "
            f"{said(own)}."
        )


def saved_schedules(state: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The schedules in a checkpoint's state: (turn, place in the file, state). Without turns, the turn is ""."""
    if "turns" not in state:
        return [("", "scheduler", state["scheduler"])]
    steppings = state["turns"]["steppings"]
    return [(turn, f"turns.steppings.{turn}.scheduler", saved["scheduler"]) for turn, saved in steppings.items()]


def load_parts(run: SavedRun, path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Load the states that others check as they load: schedule, loss scale, callbacks. Where one raises, all are what
    they were. Collective.

    Raises:
        CheckpointError: names the section, and what was raised.
    """
    precision, callbacks = run.strategy.precision, run.callbacks.stateful()
    parts: dict[str, tuple[Any, Any]] = {}
    for turn, name, saved in saved_schedules(state):
        scheduler = run.schedules[turn]
        schedule = convert_like(scheduler.state_dict(), saved)
        parts[name] = scheduler, own_schedule(scheduler, schedule) if run.args.resume_with == "arguments" else schedule
    parts["loss_scaling"] = precision, state["loss_scaling"]
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
