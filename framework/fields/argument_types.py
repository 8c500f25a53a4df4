"""What the fields of arguments may hold: their declared types, options as text, an optimizer as its path."""

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from inspect import cleandoc
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    Options = dict
else:
    # What a field of options takes: a mapping, or text that is read into one when the arguments are made. Parsers are
    # shown all of it: transformers' takes the second type, jsonargparse each in turn.
    Options = None | str | dict[str, Any]


def read_options(text: str) -> dict[str, Any]:
    """Read options from text, as a command line gives it: JSON, or "name=value,name=value".

    Example:
        >>> read_options("momentum=0.9,nesterov=True")
        {'momentum': 0.9, 'nesterov': True}

    Raises:
        ValueError: the text is neither JSON nor "name=value,name=value".
    """
    if text.lstrip().startswith("{"):
        return json.loads(text)
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if any(not name.strip() or not equals for name, equals, _ in pairs):
        raise ValueError(f"Options are written as JSON or as 'name=value,name=value'. Received: {text!r}")
    return {name.strip(): literal(value.strip()) for name, _, value in pairs}


def literal(text: str) -> Any:
    """Return the Python value that a text is, or the text itself where it is none."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
"""The declared types of a dataclass, from its annotations: parsers such as transformers' write other types into the
fields themselves.
"""


def find_allowed_types(arguments: type) -> list[tuple[str, tuple[Any, ...], str]]:
    """Return (field, the types that fit it, how an error names them) of each field of a dataclass."""
    found = []
    for name, kind in hints(arguments).items():
        if isinstance(kind, dataclasses.InitVar):
            continue
        allowed = tuple(get_origin(part) or part for part in get_args(kind) or (kind,))
        wanted = "dict" if kind == Options else kind.__name__ if isinstance(kind, type) else str(kind)
        found.append((name, (*allowed, int) if float in allowed else allowed, wanted))
    return found


allowed_types: Callable[[Any], list[tuple[str, tuple[Any, ...], str]]] = cache(find_allowed_types)


def type_problems(arguments: Any) -> list[tuple[str, str]]:
    """Return (field, what it must hold) for every field that holds something of another type."""
    found = []
    for name, allowed, wanted in allowed_types(type(arguments)):
        value = getattr(arguments, name)
        fits = isinstance(value, allowed)
        if isinstance(value, bool):  # a bool is an int to Python, and a mistake where a number is asked for
            fits = bool in allowed
        if not fits:
            found.append((name, f"must be {wanted}, not {type(value).__name__}"))
    return found


def as_options(given: Any) -> Any:
    """Return options for a mapping, a text or None, and anything else as it is."""
    if isinstance(given, str):
        return read_options(given)
    return dict(given or {}) if given is None or isinstance(given, Mapping) else given


def path_of(made_by: Any) -> str:
    """Return the path that a class or function is imported from, "package.module.name", which a checkpoint can hold.

    Raises:
        ValueError: importing the path doesn't lead to the class or function.

    Example:
        >>> path_of(torch.optim.NAdam)
        'torch.optim.nadam.NAdam'
    """
    path = f"{getattr(made_by, '__module__', None)}.{getattr(made_by, '__qualname__', None)}"
    try:
        found = load(path)
    except ValueError:
        found = None
    if found is not made_by:
        raise ValueError(
            f"{made_by!r:.200} can't be imported as {path!r}, so that a checkpoint couldn't name it. Define it at the "
            "top of a module, or override TrainModule.configure_optimizer."
        )
    return path


def load(path: str) -> Any:
    """Import what a path "package.module.name" names.

    Raises:
        ValueError: there is nothing of that name.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} can't be imported: {error}") from error


def descriptions(arguments: Any) -> dict[str, str]:
    """Return what the docstring of a dataclass, or a function, says of each name in its section "Args"."""
    text = cleandoc(arguments.__doc__ or "").split("Args:\n")[1].split("\n\n")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if begins := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = begins.group(1).split(", ")
            found.update(dict.fromkeys(names, begins.group(2)))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def with_help(arguments: type) -> type:
    """Put what the docstring says of each field into the metadata of the field, where parsers look for help texts.

    Args:
        arguments: a dataclass whose fields have no metadata.
    """
    said: Mapping[str, str] = descriptions(arguments)
    for declared in dataclasses.fields(arguments):
        # A "%" is doubled, since argparse formats help texts.
        help_text = said[declared.name].replace("``", "").replace("%", "%%")
        declared.metadata = MappingProxyType({"help": help_text})
    return arguments
