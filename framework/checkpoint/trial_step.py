"""The state that a fresh optimizer would have: what a checkpoint's is measured by, before it reaches a kernel.

An optimizer makes its state in a step, by rules of its own: factored moments, 8-bit ones with their scales, none for a
small parameter. So it makes one: a copy of it steps on a tensor of zeros in the place of each kind of parameter. The
run's optimizer and parameters aren't touched, and no more than one parameter's state is in memory.
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
    """An entry of a parameter's fresh state.

    Attributes:
        shape: None where it has as many numbers as the parameter, in its form.
        dtype: of the tensor.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype


FreshState = dict[str, "FreshEntry | bool | int | float | None"]
"""Key to the tensor's form, or to the number that isn't a tensor."""


class OptionsRefused(ValueError):
    """The optimizer's own constructor, or its step, refuses options."""


def fresh_states(
    strategy: Strategy, options: list[dict[str, Any]]
) -> tuple[dict[str, FreshState], dict[str, Exception]]:
    """The state that each parameter would have after one step. Collective where a step is.

    Args:
        strategy: whose optimizer it is.
        options: of each of its groups, which are laid over the group's own.

    Returns:
        Parameter name to state, without those whose optimizer can't be tried; and for those, why.

    Raises:
        OptionsRefused: names the option's group.
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
    """The optimizer that steps each of the groups: one made of several has theirs."""
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
    """The state of a stand-in after a step with the options; why not, where the optimizer can't even step with those
    that it was made with.

    Args:
        optimizer: is copied.
        given: the options of the group, as it has them.
        options: those to try.
        stand_in: in the place of the parameter.
        number: of the group.
        numbers: that the optimizer's constructor left as the parameter's state (APOLLO's seed).
    """
    if hasattr(type(optimizer), "__del__"):  # a copy would take what the original holds outside of Python with it
        return TypeError(f"{type(optimizer).__name__} can't be copied")
    both = {**given, **options}
    for check in (_construct, _step):
        try:
            outcome = check(optimizer, both, stand_in, numbers)
        except Exception as error:
            try:
                check(optimizer, given, stand_in, numbers)
            except Exception:
                if check is _construct:  # by a signature of its own: its step will tell
                    continue
                return error
            raise OptionsRefused(f"parameter_groups[{number}].options can't work: {error}") from error
    assert outcome is not None
    return outcome


def _construct(optimizer: Optimizer, options: Mapping[str, Any], stand_in: Tensor, numbers: Mapping[str, Any]) -> None:
    """Have the optimizer's constructor check the options that it takes."""
    taken = inspect.signature(type(optimizer).__init__).parameters
    type(optimizer)([_leaf(stand_in)], **{name: value for name, value in options.items() if name in taken})


def _step(optimizer: Optimizer, options: Mapping[str, Any], stand_in: Tensor, numbers: Mapping[str, Any]) -> FreshState:
    """What a step of a copy of the optimizer leaves as the stand-in's state."""
    leaf = _leaf(stand_in)
    trial: Any = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.__dict__.pop("step", None)  # a schedule has put its own around the original's
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
    leaf.backward(torch.zeros_like(leaf))  # an optimizer that updates in backward does so here
    trial.step()
    if switches:
        trial.eval()
    return {key: _described(value, leaf) for key, value in trial.state[leaf].items()}


def _leaf(stand_in: Tensor) -> torch.nn.Parameter:
    """A parameter over the stand-in."""
    return torch.nn.Parameter(stand_in.detach())


def _described(value: Any, leaf: Tensor) -> FreshEntry | Any:
    """An entry by its form; a number as it is."""
    if not isinstance(value, Tensor):
        return value
    follows = value.ndim > 0 and value.shape == leaf.shape
    return FreshEntry(None if follows else tuple(value.shape), value.dtype)


def is_step_count(value: float) -> bool:
    """Whether a counter of steps can have that value."""
    return math.isfinite(value) and value >= 0 and value == int(value)
