"""Look a name up in a table of names to classes, and suggest the nearest one where the table has no such name."""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

Chosen = TypeVar("Chosen")
Table: TypeAlias = Mapping[str, tuple[str | type, Mapping[str, Any]]]
"""Names to ("file:Class", options of the name's own); a class that was registered stands there itself."""
FEW = 20  # names that a message still lists


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Write the half sentence that ends an unknown-name error: the nearest name, then all of them.

    Example:
        >>> did_you_mean("learning_rte", ["learning_rate", "seed"])
        "Did you mean 'learning_rate'? Known: learning_rate, seed."
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Known: {', '.join(names)}."


def near_names(name: str, known: Iterable[str]) -> str:
    """Write the same where there may be too many names to list: then the nearest ones alone.

    Example:
        >>> near_names("logging_step", [f"option_{i}" for i in range(20)] + ["logging_steps", "logging_strategy"])
        "Did you mean 'logging_steps' or 'logging_strategy'?"
    """
    names = sorted(known)
    if len(names) <= FEW:
        return did_you_mean(name, names) if names else "It has none."
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    parts = {part for part in name.split("_") if len(part) > 3}
    nearest += [each for each in names if parts & set(each.split("_")) and each not in nearest][: 3 - len(nearest)]
    if not nearest:
        return f"None of its {len(names)} names is near that."
    *others, last = map(repr, nearest)
    return f"Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def resolve(
    kind: str,
    choice: Any,
    base: type[Chosen],
    table: Table,
    aliases: Mapping[str, str],
    package: str,
) -> Chosen:
    """Make an instance of ``base`` from a name in ``table``; return ``choice`` itself where it is one already.

    Args:
        kind: what is being chosen, for the messages ("precision").
        choice: a name, an alias, or an instance of ``base``.
        base: the class that every entry derives from.
        table: of names.
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
    made: Chosen = class_at(location, package)(**options)
    return made


def class_at(location: str | type, package: str) -> Any:
    """Import the class of an entry of a table whose files live in ``package``."""
    if isinstance(location, type):
        return location
    file, _, class_name = location.partition(":")
    return getattr(import_module(f"{package}.{file}"), class_name)


def add_class(
    kind: str,
    added: type,
    base: type,
    table: dict[str, tuple[str | type, Mapping[str, Any]]],
    aliases: Mapping[str, str],
) -> None:
    """Add a class from outside the package to a table, under its ``name``. The same name again takes the place of the
    first: a file may be run as a program and be imported as well, and a cell of a notebook be run twice.

    Args:
        kind: what is added, for the messages ("precision").
        added: the class.
        base: what it must derive from.
        table, aliases: of the kind.

    Raises:
        TypeError: it is no class of the kind.
        ValueError: it has no name of its own, or one of the package's.
    """
    if not (isinstance(added, type) and issubclass(added, base)):
        raise TypeError(f"register_{kind} takes a class that derives from {base.__name__}. Received: {added!r}")
    name, example = vars(added).get("name"), added.__name__.lower()
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(
            f"{added.__name__} has no name of its own to be registered by. Write name = {example!r} in the class; a "
            "name with a dot would be taken for a path."
        )
    if name in aliases or isinstance(table.get(name, (added,))[0], str):
        raise ValueError(f"{kind}={name!r} is stratagem's own. Give {added.__name__} another name: name = {example!r}.")
    table[name] = added, {}


def files_of(table: Table) -> dict[str, str]:
    """Turn a table of names to ("file:Class", options) into one of class names to files."""
    locations = (location.partition(":") for location, _ in table.values() if isinstance(location, str))
    return {class_name: file for file, _, class_name in locations}


def lazy_exports(package: str, files: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and the ``__dir__`` of a package whose names are imported when they are first asked for
    (PEP 562).

    Args:
        package: the full name of the package, which is being imported.
        files: exported name to the file of the package that defines it.

    Example:
        ``__getattr__, __dir__ = lazy_exports(__name__, {"DDP": "strategy"})``
    """
    namespace = vars(sys.modules[package])

    def import_name(name: str) -> Any:
        if name not in files:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = namespace[name] = getattr(import_module(f"{package}.{files[name]}"), name)
        return value

    def list_names() -> list[str]:
        return sorted({*namespace, *files})

    return import_name, list_names
