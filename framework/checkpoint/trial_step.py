"""The state that a fresh optimizer would have, with which the state in a checkpoint is compared before it is used.

An optimizer makes its state in a step, by its own rules: factored moments, 8-bit moments with their scales, no moments
for a small parameter. To find out, a copy of the optimizer makes a step on a tensor of zeros in the place of each kind
of parameter. The optimizer and the parameters of the run aren't touched, and the state of no more than one parameter is
in memory.
"""

import copy
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...strategies.base import Strategy


@dataclass(frozen=True)
class FreshEntry:
    """An entry in the fresh state of a parameter.

    Attributes:
        shape: the shape of the tensor; None where it is the shape of the parameter.
        dtype: the dtype of the tensor.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype


FreshState = dict[str, "FreshEntry | bool | int | float | None"]
"""The key of a state entry to its tensor's shape and dtype, or to the number itself where it isn't a tensor."""


class OptionsRefused(ValueError):
    """The constructor of the optimizer, or its step, refuses options."""


def fresh_states(
    strategy: Strategy, options: list[dict[str, Any]]
) -> tuple[dict[str, FreshState], dict[str, Exception]]:
    """Find the state that each parameter would have after one step. Collective where a step of the optimizer is.

    Args:
        strategy: it holds the optimizer.
        options: for each group of the optimizer, the options that replace its own.

    Returns:
        Parameter name to state, for parameters whose optimizer can be tried; and for the others, why it can't.

    Raises:
        OptionsRefused: the message names the group of the options.
    """
    assert strategy.optimizer is not None
    names = {id(parameter): name for name, parameter in strategy.stepped_parameters().items()}
    found: dict[str, FreshState] = {}
    failed: dict[str, Exception] = {}
    tried: dict[Any, FreshState | Exception] = {}
    for number, (owner, group) in enumerate(zip(owners_of(strategy), strategy.optimizer.param_groups, strict=True)):
        given = {key: value for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            stand_in = strategy.stand_in(parameter)
            kind = (number, tuple(parameter.shape), stand_in.dtype, getattr(parameter, "placements", None))
            if kind not in tried:
                numbers = {k: v for k, v in owner.state.get(parameter, {}).items() if not isinstance(v, Tensor)}
                tried[kind] = _tried(owner, given, options[number], stand_in, number, numbers)
            outcome = tried[kind]
            if isinstance(outcome, Exception):
                failed[names[id(parameter)]] = outcome
            else:
                found[names[id(parameter)]] = outcome
    return found, failed


def owners_of(strategy: Strategy) -> list[Optimizer]:
    """Return, for each group, the optimizer that steps it, where an optimizer is made of several."""
    stepping = strategy.stepping_optimizer()
    return [part for part in getattr(stepping, "parts", [stepping]) for _ in part.param_groups]


def _tried(
    optimizer: Optimizer,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    stand_in: Tensor,
    number: int,
    numbers: Mapping[str, Any],
) -> FreshState | Exception:
    """Return the state of a stand-in after a step with the options, or why the optimizer can't be tried, where it can't
    even step with the options that it was made with.

    Args:
        optimizer: the optimizer, of which a copy steps.
        given: the options that the group has.
        options: the options to try.
        stand_in: a tensor in the place of the parameter.
        number: the number of the group.
        numbers: what the constructor of the optimizer left in the state of the parameter (APOLLO's seed).
    """
    if hasattr(type(optimizer), "__del__"):  # when a copy ends, it would free what the original holds outside of Python
        return TypeError(f"{type(optimizer).__name__} can't be copied")
    both = {**given, **options}
    for check in (_construct, _step):
        try:
            outcome = check(optimizer, both, stand_in, numbers)
        except Exception as error:
            try:
                check(optimizer, given, stand_in, numbers)
            except Exception:
                if check is _construct:  # the constructor has another signature; the step will tell
                    continue
                return error
            raise OptionsRefused(f"parameter_groups[{number}].options can't work: {error}") from error
    assert outcome is not None
    return outcome


def _construct(optimizer: Optimizer, options: Mapping[str, Any], stand_in: Tensor, numbers: Mapping[str, Any]) -> None:
    """Have the constructor of the optimizer check the options that it takes."""
    taken = inspect.signature(type(optimizer).__init__).parameters
    type(optimizer)([_leaf(stand_in)], **{name: value for name, value in options.items() if name in taken})


def _step(optimizer: Optimizer, options: Mapping[str, Any], stand_in: Tensor, numbers: Mapping[str, Any]) -> FreshState:
    """Return what a step of a copy of the optimizer leaves as the state of the stand-in."""
    leaf = _leaf(stand_in)
    trial: Any = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.__dict__.pop("step", None)  # a schedule has wrapped the step of the original
    group = {**copy.deepcopy(dict(options)), "params": [leaf]}
    if leaf.device.type == "cpu" and "capturable" in group:
        group["capturable"] = False
    trial.__dict__.update(
        param_groups=[group],
        state=defaultdict(dict, {leaf: dict(numbers)} if numbers else {}),
        handles=[],
        _optimizer_step_pre_hooks=OrderedDict(),
        _optimizer_step_post_hooks=OrderedDict(),
    )
    switches = hasattr(trial, "train") and hasattr(trial, "eval")
    if switches:
        trial.train()
    leaf.backward(torch.zeros_like(leaf))  # an optimizer that updates in backward makes its step here
    trial.step()
    if switches:
        trial.eval()
    return {key: _described(value, leaf) for key, value in trial.state[leaf].items()}


def _leaf(stand_in: Tensor) -> torch.nn.Parameter:
    """Make a parameter of the stand-in."""
    return torch.nn.Parameter(stand_in.detach())


def _described(value: Any, leaf: Tensor) -> FreshEntry | Any:
    """Return the shape and dtype of a tensor, and a number as it is."""
    if not isinstance(value, Tensor):
        return value
    follows = value.ndim > 0 and value.shape == leaf.shape
    return FreshEntry(None if follows else tuple(value.shape), value.dtype)


def is_step_count(value: float) -> bool:
    """Return whether a counter of steps can have this value."""
    return math.isfinite(value) and value >= 0 and value == int(value)
