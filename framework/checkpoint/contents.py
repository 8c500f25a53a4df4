"""What a checkpoint holds, how it is taken from a run and how it is given back.

::

    checkpoint-500/
        manifest.json                 every other file with its size and SHA-256; written last
        state.json                    progress, schedule, loss scale, data position, callbacks, running averages,
                                      parameter groups: everything that isn't a tensor
        random-00000.json             each rank's random state
        model/shard-*.safetensors     parameters and buffers by name, each rank its shards; without quantized ones,
                                      and with save_only_trainable without frozen ones; state.json has fingerprints of
                                      what is missing
        optimizer/shard-*.safetensors "<parameter>/<state key>", e.g. "head.weight/exp_avg"
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...precision.master_weights import MASTER_WEIGHT
from ...strategies.base import Strategy
from .. import random_state
from . import directory
from .directory import CheckpointError
from .frozen import check_frozen, described, fingerprints, left_out, without
from .tensors import Stored, load_tensors, stored_tensors

if TYPE_CHECKING:
    from ..fit import Fit

# How an optimizer computes is this machine's affair, not the run's.
IMPLEMENTATION_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")


@dataclass
class Snapshot:
    """A run at one moment, on one rank.

    Attributes:
        model: name to (possibly sharded) tensor, tied parameters once; perhaps only the trainable ones.
        optimizer: "<parameter>/<state key>" to tensor.
        state: everything else that all ranks share, as JSON.
        random: this rank's random state, as JSON.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: str
    random: str


def take(fit: "Fit") -> Snapshot:
    """The run as it stands between two updates. Collective."""
    strategy = fit.strategy
    strategy.settle_buffers()
    model = untied_state(strategy)
    names = left_out(strategy, fit.args.save_only_trainable).intersection(model)
    if fit.frozen.keys() != names:  # read once in a run: what is frozen doesn't change
        fit.frozen = fingerprints(strategy, {name: tensor for name, tensor in model.items() if name in names})
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
    state = {
        "run": fit.directory.line.to_dict(),
        "strategy": strategy.name,
        "precision": strategy.precision.name,
        "world_size": strategy.world_size,
        "data_size": strategy.data_size,
        "arguments": fit.args.to_dict(),
        "averages": fit.averages.state_dict(),
        "progress": fit.state.to_dict(),
        "data": {"epoch": fit.epoch_index, **fit.stream.state_dict()},
        "scheduler": fit.scheduler.state_dict(),
        "loss_scaling": strategy.precision.state_dict(),
        "callbacks": fit.callbacks.state_dict(),
        "tied": strategy.tied_names(),
        "parameter_groups": parameter_groups(strategy),
        "optimizer_numbers": numbers,
        "frozen": fit.frozen,
    }
    random = {**random_state.capture(), **strategy.random_state()}
    return Snapshot(without(model, names), tensors, as_json(state), json.dumps(random))


def as_json(state: Mapping[str, Any]) -> str:
    """The state as JSON.

    Raises:
        CheckpointError: names the part that JSON can't hold.
    """
    for name, part in state.items():
        try:
            json.dumps(part)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"The state of {name} can't be saved: {error}. A state_dict() may hold numbers, strings, lists and "
                "mappings with string keys; nothing in a checkpoint is pickled."
            ) from error
    return json.dumps(state)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return directory.read_json(path / "state.json")


def restore(fit: "Fit", path: Path) -> dict[str, Any]:
    """Give a verified checkpoint back to a placed run; nothing is changed before all of it fits. Collective.

    Returns:
        This rank's random state, to be restored when the data stands where it stood.

    Raises:
        CheckpointError: it belongs to another model.
    """
    strategy = fit.strategy
    state = read_state(path)
    model = saved_part(path, strategy, state)
    parameters = strategy.named_parameters()
    groups = match_groups(path, strategy, state["parameter_groups"])
    optimizer = optimizer_templates(path, strategy, stored_tensors(path / "optimizer"), stored_tensors(path / "model"))

    masters = master_templates(strategy, model)

    load_tensors(path / "model", model)
    strategy.load_model_state(model)
    load_tensors(path / "model", masters)
    load_tensors(path / "optimizer", optimizer)
    entries: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for key, value in {**state["optimizer_numbers"], **optimizer}.items():
        name, _, entry = key.rpartition("/")
        entries[name][entry] = value
    for name, master in masters.items():
        entries[name][MASTER_WEIGHT] = master
    strategy.load_optimizer_state({name: held for name, held in entries.items() if held})
    assert strategy.optimizer is not None
    for group, options in zip(strategy.optimizer.param_groups, groups, strict=True):
        group.update(options)
    fit.scheduler.load_state_dict(in_the_types_of(fit.scheduler.state_dict(), state["scheduler"]))
    strategy.precision.load_state_dict(state["loss_scaling"])
    fit.callbacks.load_state_dict(state["callbacks"])
    fit.averages.load_state_dict(state["averages"])
    fit.state.load(state["progress"])
    fit.epoch_index = state["data"]["epoch"]
    fit.stream.load_state_dict(state["data"])
    return random_of_rank(path, strategy, state, fit.args.seed, fit.state.global_step)


def in_the_types_of(example: Any, value: Any) -> Any:
    """A value read from JSON, with the tuples, the mappings and the keys that aren't text as ``example`` has them: a
    MultiStepLR looks for the update 10 among its milestones and would never find "10".
    """
    if isinstance(example, dict) and isinstance(value, dict):
        keys = {str(key): key for key in example}
        entries = {keys.get(key, key): in_the_types_of(example.get(keys.get(key, key)), v) for key, v in value.items()}
        return type(example)(entries)
    if isinstance(example, list | tuple) and isinstance(value, list):
        examples = [*example, *[None] * (len(value) - len(example))]
        return type(example)(in_the_types_of(e, v) for e, v in zip(examples, value, strict=False))
    return value


def load_weights(fit: "Fit", path: Path | None) -> None:
    """Take only the parameters and buffers of a checkpoint; None changes nothing. Collective.

    Raises:
        CheckpointError: it belongs to another model.
    """
    if path is None:
        return
    model = saved_part(path, fit.strategy, read_state(path))
    load_tensors(path / "model", model)
    fit.strategy.load_model_state(model)


def random_of_rank(path: Path, strategy: Strategy, state: Mapping[str, Any], seed: int, step: int) -> dict[str, Any]:
    """The random state of this rank: its own, where as many ranks saved. Else that of the saved rank with its samples:
    ranks that share samples must draw alike. One that the saved run didn't have begins a fresh stream.
    """
    saved = state["world_size"], state["data_size"]
    same = saved == (strategy.world_size, strategy.data_size)
    number = strategy.rank if same else strategy.data_rank * (saved[0] // saved[1])
    if number < saved[0]:
        return directory.read_json(path / f"random-{number:05d}.json")
    now = random_state.capture()
    random_state.seed_everything(hash((seed, strategy.data_rank, step)) % 2**32)
    fresh = random_state.capture()
    random_state.restore(now)
    return fresh


def untied_state(strategy: Strategy) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied parameters once."""
    aliases = strategy.tied_names()
    return {name: tensor for name, tensor in strategy.model_state().items() if name not in aliases}


def saved_part(path: Path, strategy: Strategy, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors that a checkpoint holds: all, or all but the frozen ones. Collective.

    Raises:
        CheckpointError: it belongs to another model, or to other frozen weights.
    """
    model, frozen = untied_state(strategy), state.get("frozen", {})
    saved = without(model, frozen)
    rest = {name: tensor for name, tensor in model.items() if name in frozen}
    check_model(path, {**saved, **rest}, {**stored_tensors(path / "model"), **described(frozen)})
    if frozen:
        check_frozen(path, strategy, rest, frozen)
    return saved


def check_model(path: Path, model: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Refuse a checkpoint whose names or shapes are not the model's.

    Raises:
        CheckpointError: lists what is missing, unexpected and of another shape.
    """
    missing = [name for name in model if name not in stored]
    unexpected = [name for name in stored if name not in model]
    reshaped = [
        f"{name} {tuple(model[name].shape)} (checkpoint: {stored[name].shape})"
        for name in model
        if name in stored and tuple(model[name].shape) != stored[name].shape
    ]
    if missing or unexpected or reshaped:
        parts = [
            f"{title}: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
            for title, names in (
                ("the checkpoint lacks", missing),
                ("the model lacks", unexpected),
                ("of another shape", reshaped),
            )
            if names
        ]
        raise CheckpointError(f"{path} is a checkpoint of another model: " + "; ".join(parts) + ".")


def parameter_groups(strategy: Strategy) -> list[dict[str, Any]]:
    """The optimizer's groups: names of the parameters, and options as JSON types."""
    assert strategy.optimizer is not None
    names = {id(parameter): name for name, parameter in strategy.stepped_parameters().items()}
    return [
        {
            "names": [names[id(p)] for p in group["params"]],
            "options": {k: plain(v) for k, v in group.items() if k not in IMPLEMENTATION_OPTIONS},
        }
        for group in strategy.optimizer.param_groups
    ]


def plain(value: Any) -> Any:
    """A number for a 0-dim tensor; anything else as it is."""
    return value.item() if isinstance(value, Tensor) else value


def match_groups(path: Path, strategy: Strategy, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved options for each of the optimizer's groups, found by parameter name: groups may be cut differently.

    Raises:
        CheckpointError: a parameter is in no saved group, one group mixes parameters with different saved options, or
            the options are another optimizer's.
    """
    by_name = {name: group["options"] for group in saved for name in group["names"]}
    matched = []
    assert strategy.optimizer is not None
    groups = parameter_groups(strategy)
    unknown = [name for group in groups for name in group["names"] if name not in by_name]
    if unknown:
        raise CheckpointError(
            f"{path} has no optimizer state for {', '.join(unknown)}: it was saved with them frozen. Resume with the "
            "same trainable parameters."
        )
    for group, current in zip(strategy.optimizer.param_groups, groups, strict=True):
        options = [by_name[name] for name in current["names"]]
        # Where each has some that the other lacks; a newer torch only adds some.
        saved_keys, keys = set(options[0] if options else ()), set(current["options"])
        if options and saved_keys - keys and keys - saved_keys:
            raise CheckpointError(
                f"{path} was saved with another optimizer: its options are {', '.join(sorted(saved_keys))}, those of "
                f"{type(strategy.optimizer).__name__} are {', '.join(sorted(keys))}."
            )
        if any(other != options[0] for other in options):
            raise CheckpointError(f"{path} was saved with other parameter groups: {current['names']} were not one.")
        matched.append(
            {
                # JSON has no tuples; betas are one.
                key: tuple(value) if isinstance(group.get(key), tuple) else value
                for key, value in (options[0] if options else {}).items()
            }
        )
    return matched


def master_templates(strategy: Strategy, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Empty float32 tensors to read master weights into, by parameter name; none where the precision keeps none."""
    assert strategy.optimizer is not None
    if not strategy.precision.master_weights:
        return {}
    trained = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    names = [name for name, p in strategy.named_parameters().items() if id(p) in trained and name in model]
    return {name: torch.empty_like(model[name], dtype=torch.float32) for name in names}


def optimizer_templates(
    path: Path, strategy: Strategy, stored: Mapping[str, Stored], stored_model: Mapping[str, Stored]
) -> dict[str, Tensor]:
    """Empty tensors to read the optimizer's state into, sharded like the parameters they belong to.

    Moments follow the dtype of what the optimizer steps on, where that isn't what it was when they were saved.

    Raises:
        CheckpointError: state for a parameter that the model doesn't have.
    """
    assert strategy.optimizer is not None
    parameters = strategy.stepped_parameters()
    model = strategy.model_state()
    on_device = {
        id(p): bool(group.get("fused") or group.get("capturable"))
        for group in strategy.optimizer.param_groups
        for p in group["params"]
    }
    templates = {}
    for key, entry in stored.items():
        name, _, _ = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{path} holds optimizer state for {name!r}, which the model doesn't have.")
        whole = model[name]
        if entry.shape == tuple(whole.shape) and entry.shape:
            stepped_on = torch.float32 if strategy.precision.master_weights else whole.dtype
            saved_with = stored_model[name].dtype if name in stored_model else stepped_on
            follows = entry.dtype.is_floating_point and saved_with != stepped_on
            templates[key] = torch.empty_like(whole, dtype=stepped_on if follows else entry.dtype)
        else:
            # Step counters: on the host, unless the optimizer's kernel reads them. Anything larger (the rows and
            # columns of a factored moment, the scales of an 8-bit one) is computed with, where the parameter is.
            on_host = not entry.shape and not on_device.get(id(parameters[name]))
            device = torch.device("cpu") if on_host else whole.device
            templates[key] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    return templates
