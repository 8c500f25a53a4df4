"""The file of a run's own configuration: YAML that needs no package to be written, and that repeats the run."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..arguments import FitArguments
from ..fields.subjects import by_subject
from .options import described


def text_of(
    values: Mapping[str, Any], target: str = "", given_by_program: Iterable[str] = (), heading: str = ""
) -> str:
    """Return a configuration as YAML, each subject under its title. Every value is JSON, which YAML contains.

    Args:
        values: by the names of options.
        target: what makes the module and the data.
        given_by_program: see ``Configuration``.
        heading: a comment at the top.
    """
    lines = [f"# {line}" for line in heading.splitlines()]
    if target:
        lines.append(f"target: {value_of(target)}")
    plain = {name for name in values if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, dot, option = name.partition(".")
        if dot:
            nested.setdefault(section, {})[option] = value
    fields = {field.name for field in dataclasses.fields(FitArguments)}
    for section in ("build", "data", "strategy", "precision"):
        inner = {"name": values[section]} if section in plain else {}
        inner |= nested.pop(section, {})
        if inner.keys() == {"name"}:
            lines.append(f"{section}: {value_of(inner['name'])}")
        elif inner:
            lines.append(f"{section}:")
            lines += [f"  {name}: {value_of(value)}" for name, value in inner.items()]
    others = [name for name in values if name in plain - fields - {"strategy", "precision"}]
    lines += [f"{name}: {value_of(values[name])}" for name in others]
    for title, names in by_subject(FitArguments).items():
        chosen = [name for name in names if name in values]
        if chosen:
            lines += ["", f"# {title[0].upper()}{title[1:]}."]
            lines += [f"{name}: {value_of(values[name])}" for name in chosen]
    if given := list(given_by_program):
        lines += ["", "# What a program gave that no file can hold: pass it to Fit.from_config again."]
        lines.append(f"given_by_program: {value_of(given)}")
    return "\n".join(lines) + "\n"


def value_of(value: Any) -> str:
    """Write a value as JSON; numbers as YAML 1.1 and 1.2 both read them.

    Raises:
        TypeError: it is of no type that JSON has.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
        # YAML 1.1 takes 1e-08 for text, and 1.0e+20 for a number.
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(str(name))}: {value_of(held)}" for name, held in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(value_of, value)) + "]"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return quoted(value) if isinstance(value, str) else json.dumps(value)


QUOTE = '"'
PAIR = re.compile(r"\\u(d[89ab]..)\\u(d[c-f]..)")  # how JSON writes a letter beyond the first 65,536


def quoted(text: str) -> str:
    """Write text as JSON, but letters that JSON writes as two, which YAML reads as two."""
    return PAIR.sub(lambda pair: f"\\U{ord(json.loads(QUOTE + pair[0] + QUOTE)):08x}", json.dumps(text))


def can_be_written(value: Any) -> bool:
    """Return whether a value has one of JSON's types all through."""
    try:
        value_of(value)
    except TypeError:
        return False
    return True


def values_of_run(
    args: FitArguments, strategy: Mapping[str, Any], precision: Mapping[str, Any], words: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of a run, by the names of options.

    Args:
        args: all fields are in it, defaults too, which another version may have others of.
        strategy, precision: "name", and options.
        words: devices, max_restarts, loggers, profiler.
    """
    found: dict[str, Any] = {}
    for section, chosen in (("strategy", strategy), ("precision", precision)):
        options = dict(chosen)
        found |= described(section, options.pop("name"), options)
    return {**found, **words, **args.to_dict()}
