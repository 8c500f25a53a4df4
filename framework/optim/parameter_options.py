"""Options of the optimizer for parameters by name: patterns to learning rates, weight decay and the optimizer's own."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...precision.names import did_you_mean
from ..fields.argument_fields import ArgumentFields

NAME = "parameter_options"
RATE, SCALE, DECAY = "learning_rate", "learning_rate_scale", "weight_decay"
OF_THE_MACHINE = ("lr", "fused", "foreach", "capturable", "differentiable", "maximize")
"""Options of optimizers that aren't taken for some parameters alone; the rate goes by another name."""

WORDS = {"lr": RATE}

Groups = list[dict[str, Any]]


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) for patterns whose options can't be."""
    return [(NAME, f"{pattern!r} {why}") for pattern, own in args.parameter_options.items() if (why := problem(own))]


def problem(own: Any) -> str | None:
    """Why this can't be the options of a pattern; None where it can."""
    if not isinstance(own, Mapping) or not own:
        return f"must have options by name, such as {{'learning_rate': 1e-4}}, not {own!r:.60}"
    if RATE in own and SCALE in own:
        return f"has {RATE} and {SCALE}, which is a factor on the run's {RATE}; give one of them"
    for name in (RATE, SCALE, DECAY):
        value = own.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            return f"has {name}={value!r}, which must be a number that isn't negative"
    if "lr" in own:
        return f"has lr; write {RATE}"
    return None


def options_of_group(own: Mapping[str, Any], args: ArgumentFields) -> dict[str, Any]:
    """A pattern's options under the names that an optimizer's groups have."""
    found: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    rate, scale = found.pop(RATE, None), found.pop(SCALE, None)
    if scale is not None:
        rate = args.learning_rate * scale
    return found if rate is None else {"lr": rate, **found}


def patterns_of(module: nn.Module, options: Mapping[str, Any]) -> dict[int, str]:
    """Find the pattern of each trainable parameter that has one: the first that matches one of its names.

    Args:
        module: whose parameters have the names that the user knows.
        options: by pattern.

    Returns:
        Pattern by the parameter's id.

    Raises:
        ValueError: a pattern matches nothing that trains, or nothing that is left for it; says which, and all of them.
    """
    matched: dict[str, dict[int, str]] = {pattern: {} for pattern in options}  # id to name
    frozen: set[str] = set()
    found: dict[int, str] = {}
    names = dict(module.named_parameters(remove_duplicate=False))
    for pattern in options:
        for name, parameter in names.items():
            if fnmatchcase(name, pattern):
                if parameter.requires_grad:
                    matched[pattern][id(parameter)] = name
                    found.setdefault(id(parameter), pattern)
                else:
                    frozen.add(pattern)
    wrong = []
    for pattern, own in matched.items():
        if not own:
            near = f"{pattern}.*" if any(name.startswith(f"{pattern}.") for name in names) else None
            hint = f"Did you mean {near!r}?" if near else did_you_mean(pattern, names) if len(names) < 20 else ""
            what = "frozen parameters alone" if pattern in frozen else f"none. {hint}".rstrip()
            wrong.append(f"{pattern!r} matches {what}")
        elif all(found[key] != pattern for key in own):
            others = dict.fromkeys(found[key] for key in own)
            wrong.append(
                f"{pattern!r} has no effect: the first pattern that matches counts, and {', '.join(map(repr, others))} "
                "before it matches the same parameters. Write it before"
            )
    if wrong:
        raise ValueError(f"{NAME} has patterns that can't work over the parameters' names:\n  " + "\n  ".join(wrong))
    return found


def split_by_options(module: nn.Module, groups: Groups, spared: set[str], args: ArgumentFields) -> Groups:
    """Split parameter groups by the patterns of ``args.parameter_options``: what no pattern matches comes first.

    Args:
        module: see ``patterns_of``.
        groups: over its trainable parameters; those that weight decay spares are in a group without others.
        spared: the names of parameters that weight decay spares; that of a pattern spares them, too.
        args: of the run.

    Raises:
        ValueError: see ``patterns_of``; or a pattern's weight decay would reach nothing.
    """
    options = args.parameter_options
    if not options:
        return groups
    found = patterns_of(module, options)
    without_decay = {id(parameter) for name, parameter in module.named_parameters() if name in spared}
    parts: Groups = []
    for pattern in (None, *options):
        own = {} if pattern is None else options_of_group(options[pattern], args)
        if own.get(DECAY) and all(key in without_decay for key, its in found.items() if its == pattern):
            raise ValueError(
                f"{NAME}: {DECAY}={own[DECAY]!r} of {pattern!r} has no effect: it matches norms and biases alone, "
                "which are never decayed. Leave it out, or write configure_optimizer."
            )
        for group in groups:
            held = [parameter for parameter in group["params"] if found.get(id(parameter)) == pattern]
            is_spared = any(id(parameter) in without_decay for parameter in held)
            kept = {name: value for name, value in own.items() if not (is_spared and name == DECAY)}
            if held:
                parts.append({**group, **kept, "params": held})
    return parts


# The optimizer that came of it.


@dataclass(frozen=True)
class ShownGroup:
    """A group of the optimizer, for the display.

    Attributes:
        pattern: that its parameters match; None for those that match none.
        parameters: how many tensors there are.
        options: by name.
    """

    pattern: str | None
    parameters: int
    options: Mapping[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.options.items()
        )
        of = "all others" if self.pattern is None else self.pattern
        return f"{of}: {self.parameters} tensor{'s' * (self.parameters != 1)}, {shown}"


def check_effect(optimizer: Optimizer, module: nn.Module, args: ArgumentFields) -> tuple[ShownGroup, ...]:
    """Refuse options that the optimizer doesn't have, or that it wasn't given.

    Args:
        optimizer: as it was made, over the module's parameters.
        module: see ``patterns_of``.
        args: of the run.

    Returns:
        The optimizer's groups, for the display; none where there are no options by name.

    Raises:
        ValueError: names the pattern, and what to write.
    """
    if not args.parameter_options:
        return ()
    found = patterns_of(module, args.parameter_options)
    shown = []
    for part, group in groups_of(optimizer):
        patterns = dict.fromkeys(found.get(id(p)) for p in group["params"])
        for pattern in patterns:
            own = {} if pattern is None else options_of_group(args.parameter_options[pattern], args)
            check_group(part, group, f"{NAME}: {pattern!r}", own)
        changed = (name for own in args.parameter_options.values() for name in options_of_group(own, args))
        told = {name: group[name] for name in dict.fromkeys(("lr", DECAY, *changed)) if name in group}
        told = {WORDS.get(name, name).replace("_", " "): value for name, value in told.items()}
        shown.append(ShownGroup(next(iter(patterns), None), len(group["params"]), told))
    return tuple(shown)


def groups_of(optimizer: Optimizer) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
    """Each group, with the optimizer that steps it, where one is made of several."""
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups:
            yield part, group


def check_group(optimizer: Optimizer, group: Mapping[str, Any], of: str, own: Mapping[str, Any]) -> None:
    """Refuse options of a pattern that a group doesn't have, by the optimizer that steps it.

    Raises:
        ValueError: begins with ``of``.
    """
    kind = type(optimizer).__name__
    known = [name for name in optimizer.defaults if name not in OF_THE_MACHINE]
    for name, value in own.items():
        if name != "lr" and name not in known:
            raise ValueError(
                f"{of}: {kind}, which steps what it matches, has no option {name!r} for some parameters alone. It "
                f"takes {RATE}, {SCALE}{''.join(f', {each}' for each in known)}."
            )
        is_spared = name == DECAY and group.get(name) == 0.0
        if group.get(name) != value and not is_spared:
            raise ValueError(
                f"{of}: {name}={value!r} has no effect: {kind} was made with {group.get(name)!r}. Have "
                "configure_optimizer call super().configure_optimizer(args), or leave it out."
            )
    if own and (refusal := refused_by(optimizer, group)):
        raise ValueError(f"{of}: {kind} can't take that: {refusal}")


def refused_by(optimizer: Optimizer, group: Mapping[str, Any]) -> Exception | None:
    """What the constructor of an optimizer says against the options of a group, at which it doesn't look by itself;
    None where it can't be asked.
    """
    taken = inspect.signature(type(optimizer).__init__).parameters
    if hasattr(type(optimizer), "__del__"):
        return None
    for options in (optimizer.defaults, group):
        left_out = ("params", *OF_THE_MACHINE[1:])
        given = {name: value for name, value in options.items() if name in taken and name not in left_out}
        try:
            type(optimizer)([nn.Parameter(torch.zeros(1, 1))], **given)
        except Exception as error:
            return None if options is optimizer.defaults else error
    return None
