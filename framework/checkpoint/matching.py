"""Checks that a checkpoint fits the run that loads it: names, shapes, dtypes, parameter groups, options."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...precision.master_weights import MASTER_WEIGHT
from ...strategies.base import Strategy
from .directory import CheckpointError
from .tensors import Stored
from .trial_step import FreshEntry, FreshState, is_step_count

# These options say how an optimizer computes, which depends on this machine and not on the run.
IMPLEMENTATION_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")


def check_model(path: Path, model: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Refuse a checkpoint whose tensors differ from the model's in name, shape or kind of number.

    Raises:
        CheckpointError: the message lists what is missing, unexpected, of another shape and of another kind.
    """
    missing = [name for name in model if name not in stored]
    unexpected = [name for name in stored if name not in model]
    common = [(name, tensor, stored[name]) for name, tensor in model.items() if name in stored]
    reshaped = [
        f"{name} {tuple(tensor.shape)} (checkpoint: {found.shape})"
        for name, tensor, found in common
        if tuple(tensor.shape) != found.shape
    ]
    retyped = [
        f"{name} {tensor.dtype} (checkpoint: {found.dtype})"
        for name, tensor, found in common
        if not are_of_one_kind(tensor.dtype, found.dtype)
    ]
    if missing or unexpected or reshaped or retyped:
        parts = [
            f"{title}: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
            for title, names in (
                ("the checkpoint lacks", missing),
                ("the model lacks", unexpected),
                ("of another shape", reshaped),
                ("of another kind of numbers", retyped),
            )
            if names
        ]
        raise CheckpointError(f"{path} is a checkpoint of another model: " + "; ".join(parts) + ".")


def are_of_one_kind(one: torch.dtype, other: torch.dtype) -> bool:
    """Return whether values of one dtype can be read into the other: both are floating point, or they are the same."""
    return one == other or (one.is_floating_point and other.is_floating_point)


def check_listed(folder: Path, listed: Mapping[str, Mapping[str, Any]], stored: Mapping[str, Stored]) -> None:
    """Compare the tensors in a folder with those that state.json lists.

    Raises:
        CheckpointError: the message names a tensor that is missing, not listed, or of another shape or dtype.
    """
    for name in {**listed, **stored}:
        if name not in stored:
            raise CheckpointError(f"{folder} lacks {name}, which state.json lists.")
        if name not in listed:
            raise CheckpointError(f"{folder} holds {name}, which state.json doesn't list.")
        form, found = listed[name], stored[name]
        if tuple(form["shape"]) != found.shape or form["dtype"] != str(found.dtype):
            raise CheckpointError(
                f"{folder} holds {name} with the shape {found.shape} and dtype {found.dtype}; state.json says "
                f"{tuple(form['shape'])} and {form['dtype']}."
            )


# Parameter groups and options.


def parameter_groups(strategy: Strategy) -> list[dict[str, Any]]:
    """Return, for each group of the optimizer, the names of its parameters, and its options as JSON types."""
    assert strategy.optimizer is not None
    names = {id(parameter): name for name, parameter in strategy.stepped_parameters().items()}
    return [
        {
            "names": [names[id(p)] for p in group["params"]],
            "options": {k: to_number(v) for k, v in group.items() if k not in IMPLEMENTATION_OPTIONS},
        }
        for group in strategy.optimizer.param_groups
    ]


def to_number(value: Any) -> Any:
    """Return a number for a 0-dim tensor, and anything else as it is."""
    return value.item() if isinstance(value, Tensor) else value


def match_groups(
    path: Path, strategy: Strategy, saved: list[dict[str, Any]], own_count: bool = False
) -> list[dict[str, Any]]:
    """Find the saved options for each group of the optimizer, by parameter name, since groups may be cut differently.

    Args:
        path: the checkpoint.
        strategy: it holds the optimizer.
        saved: the groups in the checkpoint.
        own_count: whether the run's own options count, so that those of parameters in one group may have differed.

    Raises:
        CheckpointError: a parameter is in no saved group, one group mixes parameters with different saved options, the
            options are those of another optimizer, or an option has another type than the optimizer's own.
    """
    by_name = {name: (number, group["options"]) for number, group in enumerate(saved) for name in group["names"]}
    matched = []
    assert strategy.optimizer is not None
    groups = parameter_groups(strategy)
    unknown = [name for group in groups for name in group["names"] if name not in by_name]
    if unknown:
        raise CheckpointError(
            f"{path} has no optimizer state for {', '.join(unknown)}: it was saved with them frozen. Resume with the "
            "same trainable parameters."
        )
    for current in groups:
        options = [by_name[name] for name in current["names"]]
        number, first = options[0] if options else (0, {})
        # Each side has options that the other lacks: another optimizer. A newer torch only adds options.
        saved_keys, keys = set(first), set(current["options"])
        if options and saved_keys - keys and keys - saved_keys:
            raise CheckpointError(
                f"{path} was saved with another optimizer: its options are {', '.join(sorted(saved_keys))}, those of "
                f"{type(strategy.optimizer).__name__} are {', '.join(sorted(keys))}."
            )
        if options and "lr" in keys - saved_keys:  # no version had none
            raise CheckpointError(f"{path / 'state.json'}: parameter_groups[{number}].options lacks lr.")
        if not own_count and any(other != first for _, other in options):
            raise CheckpointError(f"{path} was saved with other parameter groups: {current['names']} were not one.")
        for key, value in first.items():
            field = f"parameter_groups[{number}].options.{key}"
            check_like(path / "state.json", field, current["options"].get(key), value)
        # JSON has no tuples, and betas are a tuple.
        matched.append({key: convert_like(current["options"].get(key), value) for key, value in first.items()})
    return matched


def check_like(file: Path, field: str, example: Any, value: Any) -> None:
    """Refuse a value of another type than the run's own: a list for a number, text for a flag. Any value is like an
    example of None. Numbers must be finite, unless the example isn't.

    Raises:
        CheckpointError: the message names the field.
    """

    def refuse(why: str) -> None:
        raise CheckpointError(f"{file}: {field} is {value!r:.60}: {why}.")

    if isinstance(example, Mapping):
        if not isinstance(value, Mapping):
            refuse("this run has a mapping there")
        known = {str(key): entry for key, entry in example.items()}
        for key, entry in value.items():
            check_like(file, f"{field}.{key}", known.get(key), entry)
    elif isinstance(example, list | tuple):
        if not isinstance(value, list | tuple):
            refuse("this run has a list there")
        if isinstance(example, tuple) and len(value) != len(example):
            refuse(f"this run has {len(example)} values there")
        for number, entry in enumerate(value):
            check_like(file, f"{field}[{number}]", example[min(number, len(example) - 1)] if example else None, entry)
    elif isinstance(example, bool | str):
        if type(value) is not type(example):
            refuse(f"this run has {example!r} there")
    elif isinstance(example, int | float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(f"this run has {example!r} there")
        if isinstance(example, int) and isinstance(value, float) and value != value // 1:
            refuse("it is no whole number")
        if not math.isfinite(value) and math.isfinite(example):
            refuse("it isn't finite")


def convert_like(example: Any, value: Any) -> Any:
    """Convert a value read from JSON into the types of ``example``: tuples, mappings, and keys that aren't text. A
    MultiStepLR looks for the update 10 among its milestones and would never find "10".
    """
    if isinstance(example, dict) and isinstance(value, dict):
        keys = {str(key): key for key in example}
        entries = {keys.get(key, key): convert_like(example.get(keys.get(key, key)), v) for key, v in value.items()}
        return type(example)(entries)
    if isinstance(example, list | tuple) and isinstance(value, list):
        examples = [*example, *[None] * (len(value) - len(example))]
        return type(example)(convert_like(e, v) for e, v in zip(examples, value, strict=False))
    return value


# The optimizer's state.


def master_templates(strategy: Strategy, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make empty float32 tensors to read master weights into, by parameter name, where the precision keeps any."""
    assert strategy.optimizer is not None
    if not strategy.precision.master_weights:
        return {}
    trained = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    names = [name for name, p in strategy.named_parameters().items() if id(p) in trained and name in model]
    return {name: torch.empty_like(model[name], dtype=torch.float32) for name in names}


def optimizer_templates(
    path: Path,
    strategy: Strategy,
    model: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    stored_model: Mapping[str, Stored],
    fresh: Mapping[str, FreshState],
) -> dict[str, Tensor]:
    """Make empty tensors to read the optimizer's state into, sharded like the parameters that they belong to.

    Moments get the dtype of what the optimizer steps on now, where that was another dtype when they were saved.

    Args:
        path: the checkpoint.
        strategy: it holds the optimizer.
        model: the tensors of the model by name, as they are placed.
        stored, stored_model: what the checkpoint holds of the optimizer and of the model.
        fresh: the state that each parameter would have, where that can be known.

    Raises:
        CheckpointError: an entry belongs to no parameter, or has another shape or dtype than the optimizer's own.
    """
    assert strategy.optimizer is not None
    parameters = strategy.stepped_parameters()
    groups = {id(p): group for group in strategy.optimizer.param_groups for p in group["params"]}
    # An optimizer that lays all parameters end to end (LBFGS) keeps its state with the first parameter.
    together = sum(parameter.numel() for parameter in parameters.values())
    templates = {}
    for key, entry in stored.items():
        name, _, word = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{path} holds optimizer state for {name!r}, which the model doesn't have.")
        group = groups.get(id(parameters[name]))
        if group is None:
            continue  # the parameter was frozen since, and needs no state
        whole = model[name]
        stepped_on = torch.float32 if strategy.precision.master_weights else whole.dtype
        saved_with = stored_model[name].dtype if name in stored_model else stepped_on
        reads_on_device = bool(group.get("fused") or group.get("capturable"))
        follows = entry.shape == tuple(whole.shape) and bool(entry.shape)
        dtype = stepped_on if entry.dtype.is_floating_point and follows and saved_with != stepped_on else entry.dtype
        if name in fresh:
            own = check_entry(path, key, entry, tuple(whole.shape), fresh[name].get(word))
            if saved_with != stepped_on:
                dtype = own
            elif entry.dtype != own and (reads_on_device or entry.dtype != torch.float32):
                raise CheckpointError(
                    f"{path / 'optimizer'}: {key} has the dtype {entry.dtype}; that of a fresh optimizer is {own}."
                )
        elif entry.shape and not follows and (reads_on_device or math.prod(entry.shape) > together):
            raise CheckpointError(
                f"{path / 'optimizer'}: {key} has the shape {entry.shape}; its parameter has {tuple(whole.shape)}."
            )
        if follows:
            templates[key] = torch.empty_like(whole, dtype=dtype)
        else:
            # Step counters: on the host, unless the optimizer's kernel reads them. Anything larger (the rows and
            # columns of a factored moment, the scales of an 8-bit one) is computed with, where the parameter is.
            on_host = not entry.shape and not reads_on_device
            device = torch.device("cpu") if on_host else whole.device
            templates[key] = torch.empty(entry.shape, dtype=dtype, device=device)
    return templates


def check_entry(path: Path, key: str, entry: Stored, whole: tuple[int, ...], own: Any) -> torch.dtype:
    """Return the dtype that a fresh optimizer has for a stored entry, and refuse an entry that doesn't fit.

    Args:
        path: the checkpoint.
        key: "<parameter>/<state key>".
        entry: what is stored.
        whole: the whole shape of the parameter.
        own: the entry of a fresh optimizer; None where it has none.

    Raises:
        CheckpointError: the entry has another shape, or another kind of numbers.
    """
    place = f"{path / 'optimizer'}: {key}"
    if not isinstance(own, FreshEntry):
        raise CheckpointError(f"{place} is a tensor of shape {entry.shape}, and this run's optimizer has none there.")
    shape = whole if own.shape is None else own.shape
    if entry.shape != shape:
        raise CheckpointError(
            f"{place} has the shape {entry.shape}; the parameter has {whole}, and a fresh optimizer's entry {shape}."
        )
    if not are_of_one_kind(entry.dtype, own.dtype):
        raise CheckpointError(f"{place} has the dtype {entry.dtype}; that of a fresh optimizer is {own.dtype}.")
    return own.dtype


def check_entries(path: Path, keys: Mapping[str, Any], fresh: Mapping[str, FreshState], updates: int) -> None:
    """Refuse a state with missing entries: an optimizer that finds some of its entries doesn't make the others.

    Args:
        path: the checkpoint.
        keys: "<parameter>/<state key>" of the saved tensors and numbers, with the values of the numbers.
        fresh: the state that each parameter would have.
        updates: how many updates the optimizer has made.

    Raises:
        CheckpointError: the message names the entry.
    """
    held: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        name, _, word = key.rpartition("/")
        held.setdefault(name, {})[word] = value
    for name, entries in held.items():
        if name not in fresh:
            continue
        for word, own in fresh[name].items():
            if word not in entries and own is not None and word != MASTER_WEIGHT:
                raise CheckpointError(f"{path / 'optimizer'} lacks {name}/{word}, and has other state of {name}.")
        for word, value in entries.items():
            if isinstance(value, Stored):
                continue
            field = f"optimizer_numbers[{f'{name}/{word}'!r}]"
            if isinstance(fresh[name].get(word), FreshEntry) or word not in fresh[name]:
                why = "the optimizer has no number there"
                raise CheckpointError(f"{path / 'state.json'}: {field} is {value!r:.60}: {why}.")
            check_like(path / "state.json", field, fresh[name][word], value)
            if word == "step" and isinstance(value, int | float) and not is_step_count(value):
                raise CheckpointError(f"{path / 'state.json'}: {field} is {value!r}: no count of steps.")
    if not held and updates and any(own is not None for state in fresh.values() for own in state.values()):
        raise CheckpointError(f"{path} holds no state of the optimizer, which has made {updates} updates.")


def check_counters(path: Path, optimizer: Mapping[str, Tensor]) -> None:
    """Refuse counters of steps whose values can't be counts.

    Raises:
        CheckpointError: the message names the entry.
    """
    for key, tensor in optimizer.items():
        if key.endswith("/step") and tensor.numel() == 1 and not is_step_count(tensor.item()):
            raise CheckpointError(f"{path / 'optimizer'}: {key} is {tensor.item()!r}: no count of steps.")
