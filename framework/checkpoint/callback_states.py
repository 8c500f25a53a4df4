"""The states of callbacks in a checkpoint: tensors are stored by name, and everything else as JSON."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...strategies.base import Strategy
from .directory import CheckpointError
from .dtypes import DTYPES

if TYPE_CHECKING:
    from .tensors import Stored  # importing it takes longer than anything in here

MARK = "$tensor"
"""The key of the mapping that stands for a tensor in JSON: {"$tensor": name, "device": "cpu", "sharded": false}."""


def check_states(states: Mapping[str, Any]) -> None:
    """Refuse states of callbacks that no checkpoint can hold, when training begins and not at the first save.

    Raises:
        TypeError: the message names the callback, and the entry of its state.
    """
    split_tensors(states)


def split_tensors(states: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Separate the states of callbacks from their tensors, which are named "<callback>/<key>/<key>...".

    Returns:
        (states as JSON types, tensors by name).

    Raises:
        TypeError: the message names the callback, and the entry that can't be stored.
    """
    tensors: dict[str, Tensor] = {}
    return {name: _without_tensors(state, name, tensors) for name, state in states.items()}, tensors


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES.values() or value.is_sparse or value.is_meta:
            raise TypeError(_refusal(place, f"a tensor of {value.dtype}, {value.layout}, on {value.device}"))
        tensors[place] = value.detach()
        sharded = hasattr(value, "placements")
        return {MARK: place, "device": value.device.type, "sharded": sharded}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == MARK:
                raise TypeError(_refusal(place, f"a mapping with the key {key!r}"))
        return {key: _without_tensors(entry, f"{place}/{key}", tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(entry, f"{place}/{number}", tensors) for number, entry in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:  # the value may be of a subclass, such as an enumeration of numbers or strings
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(_refusal(place, f"a {type(value).__name__}")) from error


def _refusal(place: str, what: str) -> str:
    callback, _, entry = place.partition("/")
    return (
        f"The state_dict() of {callback} can't be saved in a checkpoint: {entry or 'it'} is {what}. It may hold "
        "numbers, strings, tensors, lists and mappings with string keys; nothing in a checkpoint is pickled."
    )


def make_templates(
    path: Path,
    states: Mapping[str, Any],
    current: Mapping[str, Any],
    stored: "Mapping[str, Stored]",
    strategy: Strategy,
    model: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Make empty tensors to read the tensors of callbacks into, on the devices that they were saved from.

    Args:
        path: the checkpoint.
        states: the saved states, as JSON, of callbacks that this run has too.
        current: the tensors that the callbacks have now, by name.
        stored: the tensors in the checkpoint.
        strategy: its device stands for the accelerator.
        model: the tensors of the model. A tensor that was sharded and has the name of one of these is sharded like it.

    Raises:
        CheckpointError: a tensor is missing in the checkpoint.
    """
    found: dict[str, Tensor] = {}
    first_names = strategy.tied_names()
    for mark in _marks(states):
        name = mark[MARK]
        if not isinstance(name, str) or name not in stored:
            raise CheckpointError(f"{path / 'callbacks'} lacks {name!r:.100}, which the callbacks' states tell of.")
        form = stored[name]
        parameter = name.rpartition("/")[2]
        likes = [current.get(name), model.get(first_names.get(parameter, parameter))]
        fitting = [t for t in likes if t is not None and hasattr(t, "placements") and tuple(t.shape) == form.shape]
        if fitting and mark.get("sharded") is True:
            found[name] = torch.empty_like(fitting[0], dtype=form.dtype)
        else:
            device = torch.device("cpu") if mark.get("device") == "cpu" else strategy.device
            found[name] = torch.empty(form.shape, dtype=form.dtype, device=device)
    return found


def _marks(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, Mapping):
        if MARK in value:
            yield dict(value)
        else:
            for entry in value.values():
                yield from _marks(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _marks(entry)


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back into a state."""
    if isinstance(value, Mapping):
        return tensors[value[MARK]] if MARK in value else {key: join_tensors(v, tensors) for key, v in value.items()}
    return [join_tensors(entry, tensors) for entry in value] if isinstance(value, list) else value


def tensors_to_write(tensors: Mapping[str, Tensor], strategy: Strategy) -> dict[str, Tensor]:
    """Return the tensors that this rank writes: rank 0 writes all, and other ranks their shards alone."""
    return {name: t for name, t in tensors.items() if strategy.is_main or hasattr(t, "placements")}
