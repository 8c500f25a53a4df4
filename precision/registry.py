"""Names to classes, imported when they are asked for; a wrong name suggests the nearest."""

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from .base import Precision

# name -> "file:Class"; the class receives the name's own options.
PRECISIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "32-true": ("full:Full", {}),
    "64-true": ("double:Double", {}),
    "bf16-mixed": ("mixed:BF16Mixed", {}),
    "bf16-true": ("half:BF16True", {}),
    "16-mixed": ("mixed:FP16Mixed", {}),
    "16-true": ("half:FP16True", {}),
    "fp8": ("fp8:FP8", {}),
    "mxfp8": ("mxfp8:MXFP8", {}),
    "fp8-te": ("transformer_engine:TransformerEngine", {}),
    "apex-O1": ("apex:ApexO1", {}),
    "apex-O2": ("apex:ApexO2", {}),
}
ALIASES: Mapping[str, str] = {
    "fp32": "32-true",
    "32": "32-true",
    "fp64": "64-true",
    "64": "64-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
    "16": "16-mixed",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The half sentence that ends an unknown-name error: the nearest name, then all of them.

    Example:
        >>> did_you_mean("learning_rte", ["learning_rate", "seed"])
        "Did you mean 'learning_rate'? Known: learning_rate, seed."
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Known: {', '.join(names)}."


def resolve(
    kind: str,
    choice: Any,
    base: type,
    table: Mapping[str, tuple[str, Mapping[str, Any]]],
    aliases: Mapping[str, str],
    package: str,
) -> Any:
    """An instance of ``base`` from a name in ``table``, or ``choice`` itself where it is one already.

    Args:
        kind: what is being chosen, for the messages ("precision").
        choice: a name, an alias, or an instance of ``base``.
        base: the class that every entry derives from.
        table: name to ("file:Class", options).
        aliases: other spellings of the names.
        package: where the table's files live.

    Raises:
        ValueError: the name is not in the table.
        TypeError: ``choice`` is neither a name nor an instance, or an instance of a class without a name.
    """
    if isinstance(choice, base):
        if "name" in base.__annotations__ and not isinstance(getattr(choice, "name", None), str):
            made_by = type(choice).__name__
            raise TypeError(
                f"{made_by} is a {base.__name__} without a name, which logs, checkpoints and messages call it by. "
                f'Write name = "{made_by.lower()}" in the class.'
            )
        return choice
    if not isinstance(choice, str):
        raise TypeError(
            f"{kind} takes a name or a {base.__name__} instance, e.g. {kind}={next(iter(table))!r}. "
            f"Received: {choice!r}"
        )
    name = aliases.get(choice, choice)
    if name not in table:
        raise ValueError(f"Unknown {kind} {choice!r}. {did_you_mean(choice, [*table, *aliases])}")
    location, options = table[name]
    file, _, class_name = location.partition(":")
    return getattr(import_module(f"{package}.{file}"), class_name)(**options)


def class_of(name: str) -> type[Precision]:
    """The class of a name in PRECISIONS, which can be asked where none can be made: some want a GPU, or a package."""
    file, _, class_name = PRECISIONS[name][0].partition(":")
    return getattr(import_module(f".{file}", __package__), class_name)


def get_precision(choice: "str | Precision") -> Precision:
    """The precision for a name ("bf16-mixed", "fp16", ...) or an instance, which is returned as it is."""
    return resolve("precision", choice, Precision, PRECISIONS, ALIASES, __package__ or "")
