"""Entries of a configuration file, YAML, TOML or JSON, each with the line that it stands on."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ".yaml", ".yml", ".toml", ".json"
CLASS_PATH, INIT_ARGS = "class_path", "init_args"  # how jsonargparse writes a class and its arguments
SECTIONS = ("build", "data", "strategy", "precision")
"""Keys whose mapping holds options of their own; in other places a mapping is a value."""
NAMED = {"strategy": "name", "precision": "name"}
"""Sections that are a word, or a mapping that holds the word beside its options."""


class ConfigurationError(ValueError):
    """What is wrong with a configuration: all of it, with files and lines.

    Args:
        problems: sentences.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("This configuration can't work:\n  " + "\n  ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Entry:
    """One entry of a file.

    Attributes:
        key: the name, with dots: "learning_rate", "strategy.replicas", "build.width".
        value: of JSON's types.
        file: as it was given.
        line: from 1; 0 where it isn't known.
    """

    key: str
    value: Any
    file: str
    line: int = 0

    @property
    def place(self) -> str:
        """Where the entry stands: "run.yaml, line 3"."""
        return f"{self.file}, line {self.line}" if self.line else self.file


@dataclass(frozen=True)
class Node:
    """A value as a file holds it: a scalar or a list in ``value``, or a mapping of names to nodes."""

    value: Any
    line: int


def read_entries(path: str | Path, sections: tuple[str, ...] = SECTIONS) -> list[Entry]:
    """Read a configuration file, by its ending: .toml is TOML, anything else YAML (of which JSON is a part).

    Args:
        path: of the file.
        sections: keys whose mapping holds options, which become entries of their own.

    Raises:
        ConfigurationError: the file can't be read, or holds an entry twice.
        ImportError: PyYAML isn't installed.

    Example:
        Of "learning_rate: 3e-4" and "strategy: {name: fsdp2, replicas: 2}" on two lines, the entries are
        ``learning_rate``, ``strategy`` and ``strategy.replicas``, with the lines 1, 2 and 2.
    """
    file = str(path)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError([f"{file} can't be read: {error}"]) from error
    node = read_toml(text, file) if Path(path).suffix.lower() == ".toml" else read_yaml(text, file)
    if node.value is None:
        return []
    if not isinstance(node.value, dict):
        raise ConfigurationError([f"{file}, line {node.line}: holds {plain(node)!r:.60}, not names with values."])
    entries = [entry for key, below in node.value.items() for entry in entries_of(key, below, file, sections)]
    first: dict[str, Entry] = {}
    twice = [
        f"{entry.place}: {entry.key!r} stands on line {first[entry.key].line} already."
        for entry in entries
        if first.setdefault(entry.key, entry) is not entry
    ]
    if twice:
        raise ConfigurationError(twice)
    return entries


def entries_of(key: str, node: Node, file: str, sections: tuple[str, ...]) -> Iterator[Entry]:
    """Yield the entry of a key, or those of the options in its mapping."""
    if key in ("build", "data") and node.value is None:
        return
    if "." in key or key not in sections or not isinstance(node.value, dict):
        yield Entry(key, plain(node), file, node.line)
        return
    for name, below in node.value.items():
        if key in NAMED and name in (NAMED[key], CLASS_PATH):
            yield Entry(key, plain(below), file, below.line)
        elif key in NAMED and name == INIT_ARGS and isinstance(below.value, dict):
            for option, value in below.value.items():
                yield Entry(f"{key}.{option}", plain(value), file, value.line)
        else:
            yield Entry(f"{key}.{name}", plain(below), file, below.line)


def plain(node: Node) -> Any:
    """Return what a node holds, without its lines."""
    return {name: plain(below) for name, below in node.value.items()} if isinstance(node.value, dict) else node.value


# YAML.

FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_yaml(text: str, file: str) -> Node:
    """Read YAML. A number is one in the form 3e-4, too, which YAML 1.1 takes for text.

    Raises:
        ConfigurationError: it is no YAML, or a key stands twice in a mapping.
        ImportError: PyYAML isn't installed, and the text isn't JSON.
    """
    try:
        import yaml
    except ImportError as error:
        try:
            return unmarked(json.loads(text))
        except ValueError:
            raise ImportError(f"Reading {file} needs PyYAML: pip install 'stratagem[cli]'") from error

    class Loader(yaml.SafeLoader):
        """Reads safe YAML alone, and 3e-4 as a number."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    twice: list[str] = []

    def marked(node: yaml.Node, line: int) -> Node:
        if not isinstance(node, yaml.MappingNode):
            return Node(loader.construct_object(node, deep=True), line)
        found: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key, at = str(loader.construct_object(key_node)), key_node.start_mark.line + 1
            if key in found:
                twice.append(f"{file}, line {at}: {key!r} stands on line {found[key].line} already.")
            found[key] = marked(value_node, at)
        return Node(found, line)

    try:
        loader = Loader(text)
        root = loader.get_single_node()
        node = Node(None, 0) if root is None else marked(root, root.start_mark.line + 1)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}" if mark is not None else file
        raise ConfigurationError([f"{where}: is no YAML: {getattr(error, 'problem', None) or error}"]) from error
    if twice:
        raise ConfigurationError(twice)
    return node


def unmarked(value: Any) -> Node:
    """Make the node of a value whose lines aren't known."""
    return Node({k: unmarked(v) for k, v in value.items()} if isinstance(value, dict) else value, 0)


# TOML.


def read_toml(text: str, file: str) -> Node:
    """Read TOML.

    Raises:
        ConfigurationError: it is no TOML.
    """
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError([f"{file}: is no TOML: {error}"]) from error
    lines = toml_lines(text)

    def marked(value: Any, path: tuple[str, ...]) -> Node:
        line = lines.get(path, 0)
        if not isinstance(value, Mapping):
            return Node(value, line)
        return Node({key: marked(below, (*path, key)) for key, below in value.items()}, line)

    return marked(found, ())


KEY = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
HEADER = re.compile(rf"\s*\[({KEY}(?:\s*\.\s*{KEY})*)\]")
ASSIGNED = re.compile(rf"\s*({KEY}(?:\s*\.\s*{KEY})*)\s*=")


def toml_lines(text: str) -> dict[tuple[str, ...], int]:
    """Find the line of each key of a TOML text, which tomllib doesn't tell. A line of a text over several lines may be
    taken for a key: the first line that could be one counts.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            table = parts_of(header.group(1))
            lines.setdefault(table, number)
        elif assigned := ASSIGNED.match(line):
            lines.setdefault((*table, *parts_of(assigned.group(1))), number)
    return lines


def parts_of(key: str) -> tuple[str, ...]:
    """Return the parts of a dotted key, without their quotes."""
    return tuple(part.strip("\"'") for part in re.findall(KEY, key))
