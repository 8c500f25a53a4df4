"""What a checkpoint holds, how it is taken from a run and how it is given back.

::

    checkpoint-500/
        manifest.json                 every other file with its size and SHA-256; written last
        tensors.json                  the headers of all shards, so that one file says where each tensor lies
        state.json                    progress, schedule, loss scale, data position, callbacks, running averages,
                                      parameter groups: everything that isn't a tensor
        random-00000.json             each rank's random state, and its place in a part of the data of its own
        log_history.jsonl             the logs, a line each: see log_history.py; the manifest doesn't list it
        model/shard-*.safetensors     parameters and buffers by name, each rank its shards; without quantized ones,
                                      and with save_only_trainable without frozen ones; state.json has fingerprints of
                                      what is missing
        optimizer/shard-*.safetensors "<parameter>/<state key>", e.g. "head.weight/exp_avg"
        model/shard-*-frozen-*        those of parts that ``frozen`` was called with: one file with a name in each
                                      checkpoint, see kept_files.py
        callbacks/shard-*.safetensors tensors in callbacks' states, e.g. "MovingAverage-0/shadow/head.weight"

``schema.py`` has the fields of the JSON files, ``matching.py`` what must fit the run.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...precision.master_weights import MASTER_WEIGHT
from ...strategies.base import Strategy
from .. import random_state
from ..agreement import on_all_ranks
from ..data.parts import own_state_problem
from . import callback_states, directory
from .directory import CheckpointError
from .finite import check_finite
from .frozen import as_stored, check_frozen, in_parts, leave_out, left_out
from .line import Line
from .loading import load_tensors
from .log_history import HistoryPart
from .matching import (
    check_counters,
    check_entries,
    check_listed,
    check_model,
    master_templates,
    match_groups,
    optimizer_templates,
    parameter_groups,
)
from .own_options import own_options, own_rates
from .parts import check_parts, check_turns, load_parts
from .saved_run import SavedRun
from .schema import read_state
from .tensors import Table, share_table
from .trial_step import OptionsRefused, fresh_states


@dataclass
class Snapshot:
    """A run at one moment, on one rank.

    Attributes:
        model: name to (possibly sharded) tensor, tied parameters once; perhaps only the trainable ones.
        frozen: those of them that are saved once.
        optimizer: "<parameter>/<state key>" to tensor.
        state: everything else that all ranks share, as JSON.
        random: this rank's random state, as JSON.
        callbacks: the tensors in callbacks' states that this rank writes, by name.
        history: the logs so far, on the main process.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: str
    random: str
    callbacks: dict[str, Tensor] = field(default_factory=dict)
    history: HistoryPart | None = None
    frozen: dict[str, Tensor] = field(default_factory=dict)

    def folders(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by the folder of a checkpoint that they are written into, but for those that are saved once."""
        return {"model": self.model, "optimizer": self.optimizer, "callbacks": self.callbacks}


def take(run: SavedRun, line: Line, names: Sequence[str] = (), choice: Mapping[str, Any] | None = None) -> Snapshot:
    """Take a snapshot of a run as it stands between two updates. Collective.

    Args:
        run: placed.
        line: of the run, see ``line.py``.
        names: that the checkpoint is given, see ``naming.py``.
        choice: how the strategy was chosen, as JSON types; None where it was named.

    Raises:
        CheckpointError: on every rank, where the weights or the optimizer's state aren't finite.
    """
    strategy = run.strategy
    strategy.settle()
    model = untied_state(strategy)
    absent = left_out(strategy, run.args.save_only_trainable).intersection(model)
    absent |= in_parts(strategy, model, lambda part: part.saved == "never")
    frozen = run.fingerprints({name: tensor for name, tensor in model.items() if name in absent})
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, entries in strategy.optimizer_state().items():
        for key, value in entries.items():
            if key == MASTER_WEIGHT:
                model[name] = value  # the parameter is its rounding
            elif isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    check_finite(strategy, model, tensors)
    callbacks, callback_tensors = callback_states.split_tensors(run.callbacks.state_dict())
    model = leave_out(model, absent)
    once = in_parts(strategy, model, lambda part: part.saved == "once")
    state = {
        "run": line.to_dict(),
        "torch": torch.__version__,
        "strategy": strategy.name,
        "precision": strategy.precision.name,
        "world_size": strategy.world_size,
        "data_size": strategy.data_size,
        "arguments": run.args.to_dict(),
        **run.state_dict(),
        "loss_scaling": strategy.precision.state_dict(),
        "callbacks": callbacks,
        "tied": strategy.tied_names(),
        "parameter_groups": parameter_groups(strategy),
        "optimizer_numbers": numbers,
        "frozen": frozen,
        "model": forms(model),
        "optimizer": forms(tensors),
        "callback_tensors": forms(callback_tensors),
    }
    if names:
        state["names"] = [*names]
    if choice is not None:
        state["choice"] = choice
    random = {**random_state.capture(), **strategy.random_state(), **run.rank_state()}
    mine = callback_states.tensors_to_write(callback_tensors, strategy)
    if (history := run.take_history()) is not None:
        state["log_history"] = vars(history.mark)
    shared = {name: model.pop(name) for name in list(model) if name in once}
    return Snapshot(model, tensors, as_json(state), json.dumps(random), mine, history, shared)


def forms(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whole shapes and dtypes by name, as JSON types."""
    return {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in tensors.items()}


def as_json(state: Mapping[str, Any]) -> str:
    """The state as JSON.

    Raises:
        CheckpointError: names the part that JSON can't hold.
    """
    name, parts = "", []
    try:
        for name, part in state.items():
            parts.append(f"{json.dumps(name)}: {json.dumps(part)}")
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The state of {name} can't be saved: {error}. A state_dict() may hold numbers, strings, lists and "
            "mappings with string keys; nothing in a checkpoint is pickled."
        ) from error
    return "{" + ", ".join(parts) + "}"


@dataclass
class Matched:
    """What a checkpoint holds, when all of it was found to fit a run: nothing of the run is changed yet.

    Attributes:
        random: this rank's random state.
        groups, saved_groups: options of each of the optimizer's groups, as they will be and as they were.
        numbers: of the optimizer's state, "<parameter>/<state key>" to value, for the parameters that are trained.
        optimizer, masters, callbacks: empty tensors to read into.
    """

    random: dict[str, Any]
    groups: list[dict[str, Any]]
    saved_groups: list[dict[str, Any]]
    numbers: dict[str, Any]
    optimizer: dict[str, Tensor]
    masters: dict[str, Tensor]
    callbacks: dict[str, Tensor]


def restore(run: SavedRun, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Give a verified checkpoint back to a placed run; nothing is changed before all of it fits. Collective.

    Args:
        run: placed, its counters at their start.
        path: the checkpoint.
        state: what ``read_state`` gave for it.

    Returns:
        This rank's random state, to be restored when the data stands where it stood.

    Raises:
        CheckpointError: it belongs to another model or run, or can't be what a run saved.
    """
    strategy = run.strategy
    check_turns(run, path, state)
    whole, table = untied_state(strategy), share_table(strategy, path)
    saved = saved_part(path, strategy, state, whole, table)
    matched = match(run, path, state, whole, saved, table)

    def load() -> None:
        load_tensors(table, "optimizer", matched.optimizer)
        load_tensors(table, "callbacks", matched.callbacks)
        check_counters(path, matched.optimizer)

    on_all_ranks(strategy, load, CheckpointError)
    load_parts(run, path, state, matched.callbacks)
    on_all_ranks(strategy, lambda: load_tensors(table, "model", matched.masters, saved), CheckpointError)
    strategy.load_model_state(saved)
    entries: dict[str, dict[str, Any]] = {name: {} for name in strategy.named_parameters()}
    for key, value in {**matched.numbers, **matched.optimizer}.items():
        name, _, entry = key.rpartition("/")
        entries[name][entry] = value
    for name, master in matched.masters.items():
        entries[name][MASTER_WEIGHT] = master
    strategy.load_optimizer_state({name: held for name, held in entries.items() if held})
    assert strategy.optimizer is not None
    for group, options in zip(strategy.optimizer.param_groups, matched.groups, strict=True):
        group.update(options)
    if run.args.resume_with == "arguments":
        rates = own_rates(run, matched.saved_groups, state)
        for group, rate in zip(strategy.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    run.load_state_dict(state)
    return matched.random


def match(
    run: SavedRun,
    path: Path,
    state: Mapping[str, Any],
    whole: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    table: Table,
) -> Matched:
    """Hold all that a checkpoint has against the run. Collective.

    Args:
        run: placed.
        path: the checkpoint.
        state: what ``read_state`` gave for it.
        whole: the model's tensors.
        saved: those of them that the checkpoint holds.
        table: of the checkpoint.

    Raises:
        CheckpointError: something doesn't fit; names file and field, or tensor.
    """
    strategy = run.strategy
    saved_groups: list[dict[str, Any]] = []
    own_count = run.args.resume_with == "arguments"

    def match_them() -> None:
        saved_groups.extend(match_groups(path, strategy, state["parameter_groups"], own_count))

    on_all_ranks(strategy, match_them, CheckpointError)
    groups = own_options(strategy, saved_groups) if own_count else saved_groups
    try:  # where a step is collective, so is this, and it fails on all ranks alike
        fresh, untried = fresh_states(strategy, groups)
    except OptionsRefused as error:
        raise CheckpointError(f"{path / 'state.json'}: {error}") from error
    result: list[Matched] = []

    def check() -> None:
        stored, stored_model, stored_callbacks = map(table.stored, ("optimizer", "model", "callbacks"))
        if "optimizer" in state:  # format 1 lists no tensors
            check_listed(path / "model", state["model"], stored_model)
            check_listed(path / "optimizer", state["optimizer"], stored)
            check_listed(path / "callbacks", state["callback_tensors"], stored_callbacks)
        updates = state["progress"]["global_step"] - state["progress"]["skipped_updates"]
        keys = {**stored, **state["optimizer_numbers"]}
        check_entries(path, keys, fresh, updates)
        for name in {key.rpartition("/")[0] for key in state["optimizer_numbers"]} - whole.keys():
            raise CheckpointError(f"{path / 'state.json'}: optimizer_numbers: the model has no {name!r}.")
        optimizer = optimizer_templates(path, strategy, whole, stored, stored_model, fresh)
        present = {key: value for key, value in state["callbacks"].items() if key in run.callbacks.stateful()}
        _, current = callback_states.split_tensors(run.callbacks.state_dict()) if stored_callbacks else ({}, {})
        templates = callback_states.make_templates(path, present, current, stored_callbacks, strategy, whole)
        check_parts(run, path, state)
        random = random_of_rank(path, strategy, state, run.args.seed, state["progress"]["global_step"])
        trained, masters = {*fresh, *untried}, master_templates(strategy, saved)
        numbers = {k: value for k, value in state["optimizer_numbers"].items() if k.rpartition("/")[0] in trained}
        result.append(Matched(random, groups, saved_groups, numbers, optimizer, masters, templates))

    on_all_ranks(strategy, check, CheckpointError)
    return result[0]


def load_weights(strategy: Strategy, path: Path | None) -> None:
    """Load only the parameters and buffers of a checkpoint; None changes nothing. Collective.

    Raises:
        CheckpointError: it belongs to another model.
    """
    if path is None:
        return
    table = share_table(strategy, path)
    model = saved_part(path, strategy, read_state(path), untied_state(strategy), table)
    with masters_of(strategy, model) as masters:
        on_all_ranks(strategy, lambda: load_tensors(table, "model", masters, model), CheckpointError)
        strategy.load_model_state(model)


@contextmanager
def masters_of(strategy: Strategy, names: Container[str]) -> Iterator[dict[str, Tensor]]:
    """Entered around the loading of weights outside of a resume: the float32 master weights that the optimizer steps,
    by parameter name, to be filled with the same values. Else the next update, and the next checkpoint, would have the
    old ones. There are none before the first update, and with formats that keep none. Collective.
    """
    state = {}
    if strategy.optimizer is not None and strategy.precision.master_weights:
        state = strategy.optimizer_state()
    masters = {name: entries[MASTER_WEIGHT] for name, entries in state.items() if MASTER_WEIGHT in entries}
    yield {name: master for name, master in masters.items() if name in names}
    if masters:
        strategy.load_optimizer_state(state)


def random_of_rank(path: Path, strategy: Strategy, state: Mapping[str, Any], seed: int, step: int) -> dict[str, Any]:
    """The random state of this rank: its own, where as many ranks saved. Else that of the saved rank with its samples:
    ranks that share samples must draw alike. One that the saved run didn't have begins a fresh stream.
    """
    saved = state["world_size"], state["data_size"]
    same = saved == (strategy.world_size, strategy.data_size)
    number = strategy.rank if same else strategy.data_rank * (saved[0] // saved[1])
    if number < saved[0]:
        file = path / f"random-{number:05d}.json"
        random: dict[str, Any] = directory.read_json(file)
        problem = random_state.problem(random) or own_state_problem(random.get("data"))
        if problem is not None:
            raise CheckpointError(f"{file} was altered: {problem}.")
        return random
    now = random_state.capture()
    random_state.seed_everything(random_state.combine_seeds(seed, strategy.data_rank, step))
    fresh = random_state.capture()
    random_state.restore(now)
    return fresh


def untied_state(strategy: Strategy) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied parameters once."""
    aliases = strategy.tied_names()
    return {name: tensor for name, tensor in strategy.model_state().items() if name not in aliases}


def saved_part(
    path: Path, strategy: Strategy, state: Mapping[str, Any], model: Mapping[str, Tensor], table: Table
) -> dict[str, Tensor]:
    """Those of the model's tensors that a checkpoint holds: all, or all but the frozen ones. Collective.

    Raises:
        CheckpointError: it belongs to another model, or to other frozen weights.
    """
    frozen = state.get("frozen", {})
    saved = leave_out(model, frozen)
    rest = {name: tensor for name, tensor in model.items() if name in frozen}

    def check() -> None:
        check_model(path, {**saved, **rest}, {**table.stored("model"), **as_stored(frozen)})

    on_all_ranks(strategy, check, CheckpointError)
    if frozen:
        check_frozen(path, strategy, rest, frozen)
    return saved
