"""Callbacks' states in a checkpoint: their tensors stored by name, and everything else as JSON."""

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
"""The key of what stands in JSON for a tensor: {"$tensor": name, "device": "cpu", "sharded": false}."""


def apart(states: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Callbacks' states without their tensors, and the tensors, named "<callback>/<key>/<key>...".

    Raises:
        TypeError: names the callback, and the entry that can't be stored.
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
    try:  # an enumeration of numbers or strings, say
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(_refusal(place, f"a {type(value).__name__}")) from error


def _refusal(place: str, what: str) -> str:
    callback, _, entry = place.partition("/")
    return (
        f"The state_dict() of {callback} can't be saved in a checkpoint: {entry or 'it'} is {what}. It may hold "
        "numbers, strings, tensors, lists and mappings with string keys; nothing in a checkpoint is pickled."
    )


def templates(
    path: Path,
    states: Mapping[str, Any],
    current: Mapping[str, Any],
    stored: "Mapping[str, Stored]",
    strategy: Strategy,
    model: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Empty tensors to read those of callbacks into, where they were when they were saved.

    Args:
        path: the checkpoint.
        states: of the callbacks that are there again, as JSON.
        current: the tensors that the callbacks have now, by name.
        stored: what the checkpoint holds.
        strategy: its device stands for the accelerator.
        model: the model's tensors: what was sharded, and is called as one of them, is sharded like it.

    Raises:
        CheckpointError: a tensor isn't there.
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


def together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A state with its tensors again."""
    if isinstance(value, Mapping):
        return tensors[value[MARK]] if MARK in value else {key: together(v, tensors) for key, v in value.items()}
    return [together(entry, tensors) for entry in value] if isinstance(value, list) else value


def of_rank(tensors: Mapping[str, Tensor], strategy: Strategy) -> dict[str, Tensor]:
    """What a rank writes of them: the first one all, the others their shards; other ranks' own copies aren't saved."""
    return {name: t for name, t in tensors.items() if strategy.is_main or hasattr(t, "placements")}
