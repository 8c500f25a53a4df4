"""The step of an optimizer on tensors that stand for its own, so that a compiler can trace it as part of a program.

The optimizer's own code runs, on a copy of it whose groups and state hold the stand-ins; the optimizer itself isn't
touched. What a program can't hold is found by comparing: a number that the step changes would stay what it was when the
program was made.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from .closure import needs_closure

IN_LOOPS: Mapping[str, bool] = {"foreach": False, "fused": False, "capturable": True}
"""Options of torch's optimizers for the form of their step that a compiler fuses best, and that reads no number."""
LEFT_OUT = ("params", "lr", "initial_lr")
SCALED = ("add", "add_", "sub", "sub_", "addcmul", "addcmul_", "addcdiv", "addcdiv_")


class CannotTraceError(ValueError):
    """An optimizer whose step can't be part of a program; says why."""

    def __init__(self, why: str) -> None:
        super().__init__(f"torch_compile='update' makes an update one program, and {why}. Write torch_compile=True.")


@dataclass(frozen=True)
class Slot:
    """Where a tensor of an optimizer's state is kept.

    Attributes:
        parameter: whose state it is.
        key: of the entry.
    """

    parameter: Tensor
    key: str


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that an optimizer is made of: itself, where it isn't made of several."""
    return list(getattr(optimizer, "parts", [optimizer]))


def slots_of(optimizer: Optimizer) -> list[Slot]:
    """The tensors in the state of an optimizer, in a fixed order."""
    return [
        Slot(parameter, key)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    ]


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group but its learning rate: what a program is made with, and what it can't change."""
    return [{name: value for name, value in group.items() if name not in LEFT_OUT} for group in optimizer.param_groups]


def check_traceable(optimizer: Optimizer) -> None:
    """Refuse an optimizer of which is known before any step that no program can hold it.

    Raises:
        CannotTraceError: says why.
    """
    for part in parts_of(optimizer):
        name = type(part).__name__
        if hasattr(part, "train") and hasattr(part, "eval"):
            raise CannotTraceError(f"{name} moves parameters outside of its step")
        if part._optimizer_step_pre_hooks or part._optimizer_step_post_hooks:
            raise CannotTraceError(f"hooks are registered on the step of {name}, and a program would run them once")
        if needs_closure(part):
            raise CannotTraceError(f"{name} evaluates the loss several times in a step")


def traced_step(
    optimizer: Optimizer,
    stand_ins: Mapping[int, Tensor],
    gradients: Mapping[int, Tensor],
    state: Mapping[tuple[int, str], Tensor],
    rates: Sequence[Tensor],
) -> dict[tuple[int, str], Tensor]:
    """Step stand-ins of an optimizer's parameters, in place.

    Args:
        optimizer: it isn't changed.
        stand_ins: the id of a parameter to the tensor that is stepped in its place, for those that have a gradient.
        gradients: the id of a parameter to its gradient.
        state: (the id of a parameter, key) to the tensor that stands for that entry of the state. It may be changed in
            place.
        rates: 0-dim learning rates, for each group of the optimizer.

    Returns:
        The state after the step, by the same keys.

    Raises:
        CannotTraceError: the step changes what no program can hold.
    """
    check_traceable(optimizer)
    held = [
        parameter for group in optimizer.param_groups for parameter in group["params"] if id(parameter) in stand_ins
    ]
    entries: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for parameter in held:
        stand_in = stand_ins[id(parameter)]
        stand_in.grad = gradients[id(parameter)]
        entries[stand_in] = {
            key: counted(state[id(parameter), key]) if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    before = {stand_in: dict(found) for stand_in, found in entries.items()}
    remaining = list(rates)
    for part in parts_of(optimizer):
        groups = [
            {
                **group,
                **{name: value for name, value in IN_LOOPS.items() if name in group},
                "params": [stand_ins[id(p)] for p in group["params"] if id(p) in stand_ins],
                "lr": remaining.pop(0),
            }
            for group in part.param_groups
        ]
        options = [dict(group) for group in groups]
        copy = object.__new__(type(part))
        vars(copy).update({**vars(part), "state": entries, "param_groups": groups})
        own = {name: value for name, value in vars(copy).items() if isinstance(value, int | float | str)}
        step: Callable[..., Any] = inspect.unwrap(type(part).step)  # without torch's profiling, and calls of hooks
        try:
            with torch.no_grad(), TensorsAsScalars():
                step(copy)
        except Exception as error:
            raise CannotTraceError(
                f"a step of {type(part).__name__} can't be part of one, as where it reads a number from a tensor "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            ) from error
        check_unchanged(part, {name: vars(copy).get(name) for name in own}, own)
        for now, then in zip(groups, options, strict=True):
            check_unchanged(part, now, then)
    after: dict[tuple[int, str], Tensor] = {}
    for parameter in held:
        stand_in = stand_ins[id(parameter)]
        stand_in.grad = None
        for key, value in entries[stand_in].items():
            if isinstance(value, Tensor):
                if key not in before[stand_in]:
                    raise CannotTraceError(
                        f"{type(optimizer).__name__} makes {key!r}, an entry of a parameter's state, after the first "
                        "update: the parameter has its first gradient only now"
                    )
                after[id(parameter), key] = value.to(state[id(parameter), key].dtype)
        numbers = {key: value for key, value in entries[stand_in].items() if not isinstance(value, Tensor)}
        check_unchanged(optimizer, numbers, {key: before[stand_in].get(key) for key in numbers})
    return after


def counted(tensor: Tensor) -> Tensor:
    """Return a 0-dim tensor in float64, in which torch's optimizers compute with such numbers where they read them to
    the host: 1 - 0.999 ** 1 has 4 right digits in float32. Any other tensor as it is.
    """
    if tensor.ndim or not tensor.is_floating_point() or tensor.device.type == "mps":
        return tensor
    return tensor.double()


def check_unchanged(optimizer: Optimizer, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuse a step that changed a number, which a program would hold as it was.

    Raises:
        CannotTraceError: names the number.
    """
    for name, value in now.items():
        if name not in then or (value is not then[name] and value != then[name]):
            raise CannotTraceError(
                f"a step of {type(optimizer).__name__} changes {name!r}, a number on the host, which would stay what "
                "it was when the program was made"
            )


class TensorsAsScalars(TorchFunctionMode):
    """Lets ``alpha=`` and ``value=`` be tensors, as a learning rate is here: torch would read them to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        for name in ("alpha", "value"):
            if isinstance(options.get(name), Tensor) and getattr(func, "__name__", "") in SCALED:
                factor = options.pop(name)
                args = (args[0], args[1] * factor, *args[2:])
        return func(*args, **options)
