"""Other names for stored tensors: patterns by which they are renamed or left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .sources import StoredWeights, some


def renamed(weights: StoredWeights, rename: Sequence[str], leave_out: Sequence[str] = ()) -> StoredWeights:
    """Rename and leave out tensors.

    Args:
        weights: as they were found.
        rename: "OLD=NEW" each, where a * stands for any text: "model.*=*" takes a prefix off. Each is applied to what
            the one before has left.
        leave_out: patterns of names, of before they are renamed.

    Raises:
        ValueError: a pattern can't be understood or fits no tensor, or two tensors would have one name.
    """
    if isinstance(rename, str) or isinstance(leave_out, str):
        raise TypeError('rename= and leave_out= take lists, such as ["model.*=*"].')
    names = {name: name for name in (*weights.tensors, *weights.tied)}
    dropped: set[str] = set()
    for pattern in leave_out:
        dropped |= fitting(compiled(pattern), names, f"leave_out={pattern!r}", weights)
    names = {name: name for name in names if name not in dropped}
    for rule in rename:
        old, separator, new = rule.partition("=")
        if not old or not separator or not new or new.count("*") > old.count("*"):
            raise ValueError(
                f"rename={rule!r} isn't OLD=NEW with as many * on the right as on the left, at most: 'model.*=*'. "
                "Leave tensors out by leave_out (--leave-out)."
            )
        expression, template = compiled(old), new.replace("\\", r"\\")
        for number in range(1, new.count("*") + 1):
            template = template.replace("*", rf"\g<{number}>", 1)
        hits = fitting(expression, names.values(), f"rename={rule!r}", weights)
        names = {name: expression.sub(template, now, count=1) if now in hits else now for name, now in names.items()}
    double: dict[str, list[str]] = {}
    for name, now in names.items():
        double.setdefault(now, []).append(name)
    clash = next((olds for olds in double.values() if len(olds) > 1), None)
    if clash is not None:
        raise ValueError(f"{weights.path}: {some(clash)} would all be called {names[clash[0]]}.")
    return with_names(weights, names)


def with_names(weights: StoredWeights, names: Mapping[str, str]) -> StoredWeights:
    """Give tensors other names; those without one are left out. Where the first name of several is left out, the next
    one has the tensor.
    """
    tensors, tied, first = {}, {}, dict[str, str]()
    for name, now in names.items():
        stored = weights.tied.get(name, name)
        if stored in first:
            tied[now] = first[stored]
        else:
            first[stored] = now
            tensors[now] = weights.tensors[stored]
    dropped = tuple(name for name in (*weights.tensors, *weights.tied) if name not in names)
    return replace(weights, tensors=tensors, tied=tied, left_out=(*weights.left_out, *dropped))


def compiled(pattern: str) -> re.Pattern[str]:
    """Make an expression of a pattern, whose stars are its groups."""
    return re.compile("(.*)".join(map(re.escape, pattern.split("*"))) + r"\Z", re.DOTALL)


def fitting(pattern: re.Pattern[str], names: object, option: str, weights: StoredWeights) -> set[str]:
    """Return the names that a pattern fits.

    Raises:
        ValueError: there is none.
    """
    known: list[str] = list(names)  # type: ignore[call-overload]
    hits = {name for name in known if pattern.match(name)}
    if not hits:
        raise ValueError(f"{option} fits no tensor of {weights.path}, which holds {some(known, 5)}.")
    return hits
