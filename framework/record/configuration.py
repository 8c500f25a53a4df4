"""The sections of a report that say what a run was asked for, and by what and on what it ran."""

from collections.abc import Mapping
from typing import Any

from .formats import NOTHING, amount, in_bytes
from .history import number
from .html import Section, code, folded, table, text


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Configuration, module, and the place where the run ran; those that the record knows nothing of are empty."""
    return [
        Section("Configuration", arguments(record)),
        Section("Module", module(record)),
        Section("Versions and host", place(record)),
    ]


def arguments(record: Mapping[str, Any]) -> str:
    """The arguments: those that aren't the defaults first, then what became of others, then all."""
    found = record.get("arguments", {})
    given, settled = mapping(found.get("given")), mapping(found.get("settled"))
    others = found.get("not_defaults")
    chosen = [name for name in given if isinstance(others, list) and name in others]
    rows = [
        [code("strategy"), code(mapping(record.get("strategy")).get("is"))],
        [code("precision"), code(mapping(record.get("precision")).get("is"))],
        *([code(name), settled_value(name, given, settled)] for name in chosen),
    ]
    became = [name for name in given if name in settled and settled[name] != given[name] and name not in chosen]
    rows += [[code(name), settled_value(name, given, settled)] for name in became]
    rest = [[code(name), code(repr(value))] for name, value in given.items() if name not in (*chosen, *became)]
    if not given:
        return ""
    shown = table((), rows, [""] * 2 + ["changed"] * len(chosen))
    return shown + folded(f"Arguments that have their default ({len(rest)})", table((), rest))


def settled_value(name: str, given: Mapping[str, Any], settled: Mapping[str, Any]) -> str:
    """An argument as it was given, and what it came to where that is something else."""
    value = code(repr(given[name]))
    return value if settled.get(name, given[name]) == given[name] else f"{value} → {code(repr(settled[name]))}"


def module(record: Mapping[str, Any]) -> str:
    """The module's class, and its parameters by child."""
    found = mapping(record.get("module"))
    if not found:
        return ""
    rows = [[code(found.get("class")), count(found.get("trainable")), count(found.get("frozen"))]]
    for name, child in list(mapping(found.get("children")).items())[:100]:
        rows.append(
            ["&emsp;" + code(name), count(mapping(child).get("trainable")), count(mapping(child).get("frozen"))]
        )
    return table(["", "trainable", "frozen"], rows, numbers=[1, 2])


def count(value: Any) -> str:
    """A number of parameters."""
    found = number(value)
    return NOTHING if found is None else f"{found:,.0f}" if found < 1e6 else f"{amount(found)} ({found:,.0f})"


def place(record: Mapping[str, Any]) -> str:
    """Versions, commit, host, device, command line."""
    rows = []
    program, host, device = (mapping(record.get(name)) for name in ("program", "host", "device"))
    if program:
        rows.append(["command", code(program.get("command"))])
        rows.append(["in", code(program.get("directory"))])
    git = mapping(record.get("git"))
    if git:
        changed = git.get("changed")
        state = (
            "clean"
            if git.get("is_clean")
            else f"changed: {', '.join(map(str, changed if isinstance(changed, list) else []))}"
        )
        rows.append(["commit", f"{code(git.get('commit'))} ({text(git.get('branch'))}), {text(state)}"])
    if host:
        rows.append(["host", text(f"{host.get('name')} · {host.get('system')} · {host.get('cpus')} CPUs")])
    if device:
        memory = number(device.get("memory_bytes"))
        rows.append(["device of the main process", text(f"{device.get('name')} · {in_bytes(memory)}")])
    if record.get("output_dir"):
        rows.append(["results", code(record["output_dir"])])
    if record.get("id_of_run"):
        rows.append(["run", code(record["id_of_run"])])
    rows += [[text(name), text(version)] for name, version in mapping(record.get("versions")).items()]
    return table((), rows)


def mapping(value: Any) -> Mapping[str, Any]:
    """A value of the record that should be a mapping; an empty one where it isn't."""
    return value if isinstance(value, Mapping) else {}
