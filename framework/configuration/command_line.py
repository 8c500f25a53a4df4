"""A run's options on a command line, read by jsonargparse (the extra ``cli``), over those of configuration files."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_origin

from ..arguments import FitArguments
from ..fields.argument_types import hints
from .configuration import (
    GIVEN_BY_PROGRAM,
    UNUSED,
    Configuration,
    names_problems,
    options_under,
    standing,
    target_at,
    unknown_name,
    words_in,
)
from .entries import FILES, ConfigurationError, Entry, read_entries
from .options import PLACEMENT, Option, flat, options_of
from .targets import REQUIRED, Target, load_target
from .writing import can_be_written, text_of

OWN = "this command"
PRINT = "print_config"
TYPED = "the command line"  # where an option stands that no file holds


@dataclass(frozen=True)
class Command:
    """A command that trains what is configured.

    Attributes:
        name: what it is called in its help.
        says: what it does.
        names_target: whether its first word is a target.
        functions: functions of the program's own whose parameters are options, by the name of the section.
    """

    name: str
    says: str
    names_target: bool = False
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def read(self, words: Sequence[str], target: Target | None = None) -> Configuration:
        """Read the words of a command line; ends the process where it asks for help, or can't work.

        Args:
            words: without the command; the first may be a target, or a file.
            target: what makes the module and the data, where no word names it.
        """
        parser = self.parser([])
        try:
            return self._read(list(words), target)
        except ConfigurationError as error:
            end(parser, "\n  ".join(["this can't work:", *error.problems]))
        except (ValueError, TypeError) as error:
            end(parser, str(error))

    def _read(self, words: list[str], target: Target | None) -> Configuration:
        if self.names_target and words and not words[0].startswith("-"):
            if words[0].endswith(FILES):
                words.insert(0, "--config")
            else:
                target = load_target(words.pop(0))
        entries = [entry for path in values_of(words, "config") for entry in read_entries(path)]
        if target is None:
            named = [entry for entry in entries if entry.key == "target"]
            target = target_at(named[-1]) if named else None
        defaults = flat(target.defaults) if target is not None else {}
        typed = [Entry(word, values[-1], TYPED) for word in UNUSED if (values := values_of(words, word))]
        chosen = standing([*entries, *typed])
        entries = [entry for entry in chosen if entry not in typed]
        options = [*options_under(chosen, defaults, target), *self.own_options()]
        parser = self.parser(options)
        if {"-h", "--help"} & set(words):
            parser.print_help()
            sys.exit(0)
        line = translated(words, options, target is not None, words_in(chosen, defaults))
        known = [option.name for option in options]
        held = {entry.key: entry.value for entry in entries if entry.key in known}
        places = {entry.key: entry.place for entry in entries}
        problems = [*line.problems, *names_problems(entries, defaults, options, target, words_in(chosen, defaults))]
        problems += types_problems(parser, held, places)
        if problems:
            files = Configuration({**defaults, **held}, target, places)
            raise ConfigurationError([*problems, *files.argument_problems(FitArguments())])
        parser.set_defaults(**{inner(name): value for name, value in held.items()})
        found = vars(parser.parse_args(line.words))
        chosen_values = {name: found[inner(name)] for name in known}
        missing = [each.name for each in options if each.default is REQUIRED and chosen_values[each.name] is None]
        if missing:
            raise ConfigurationError([f"--{name} is required: your function has no default." for name in missing])
        given = [entry.value for entry in entries if entry.key == GIVEN_BY_PROGRAM]
        run = Configuration(
            {name: value for name, value in chosen_values.items() if name.partition(".")[0] not in self.functions},
            target,
            {**places, **dict.fromkeys(line.names, TYPED)},
            tuple(given[-1]) if given else (),
            found["resume"],
            {section: section_of(chosen_values, section) for section in self.functions},
        )
        if problems := run.argument_problems(FitArguments()):
            raise ConfigurationError(problems)
        if PRINT in line.names:
            sys.stdout.write(printed(run))
            sys.exit(0)
        if self.names_target and target is None:
            raise ConfigurationError(["Name what builds the module: stratagem fit train.py:build, or target: in YAML."])
        return run

    def own_options(self) -> list[Option]:
        """Return the options of the program's own functions."""
        return [
            option
            for section, function in self.functions.items()
            for option in options_of(section, function, f"{function.__name__}()")
        ]

    def parser(self, options: Iterable[Option]) -> Any:
        """Make jsonargparse's parser of the options, grouped by subject.

        Raises:
            ImportError: jsonargparse isn't installed.
        """
        try:
            from jsonargparse import ArgumentParser
        except ImportError as error:
            raise ImportError("Options on the command line need jsonargparse: pip install 'stratagem[cli]'") from error

        class Parser(ArgumentParser):
            """Shows and names options with the dots that they are written with."""

            def format_help(self, *given: Any) -> str:
                return dotted(super().format_help(*given))

            def error(self, message: str, ex: Exception | None = None) -> NoReturn:
                raise ConfigurationError([plainly(dotted(message))])

        usage = f"{self.name} {'TARGET ' if self.names_target else ''}[--option value ...]"
        parser = Parser(prog=self.name, usage=usage, description=self.says, allow_abbrev=False)
        own = parser.add_argument_group(OWN)
        own.add_argument("--config", action="append", help="YAML or TOML with options; what comes later overrides")
        own.add_argument(f"--{PRINT}", action="store_true", help="print all options as such a file, and go")
        own.add_argument(
            "--resume", nargs="?", const=True, default=None, help="go on from the newest checkpoint, or from this one"
        )
        groups: dict[str, list[Option]] = {}
        for option in options:
            groups.setdefault(option.subject, []).append(option)
        functions = [title for title in groups if title.endswith("()")]
        for title in dict.fromkeys([*functions, PLACEMENT, *groups]):
            group = parser.add_argument_group(title)
            for option in groups.get(title, []):
                has_words = option.kind is bool or get_origin(option.kind) is Literal
                shown: dict[str, Any] = {} if has_words else {"metavar": "VALUE"}
                group.add_argument(
                    f"--{inner(option.name)}",
                    type=option.kind,
                    default=None if option.default is REQUIRED else option.default,
                    **shown,
                    help=option.says.replace("%", "%%") or "of your function",
                )
        return parser


def configure(
    build: Callable[..., Any],
    data: Callable[..., Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    words: Sequence[str] | None = None,
    **functions: Callable[..., Any],
) -> Configuration:
    """Configure a program's run from its command line, as ``stratagem fit`` does for a function in a file.

    Every field of FitArguments, placement and number format are options, and so are the parameters of the functions:
    ``--learning_rate 3e-4 --strategy fsdp2 --strategy.replicas 2 --build.width 256``; ``--config``, ``--print_config``,
    ``--resume`` and ``--help`` are there, too. Needs jsonargparse (the extra ``cli``).

    Args:
        build: returns a TrainModule, or a mapping of Fit's arguments.
        data: returns the training data, or (training data, evaluation data).
        arguments: Fit's arguments, this program's defaults.
        words: of the command line; None takes those of this process.
        **functions: of the program's own, whose parameters become options, too: ``own`` holds what was chosen.

    Returns:
        The configuration, for ``Fit.from_config``, which calls ``build`` and ``data``, on the ranks alone.

    Example:
        ``run = configure(build, data, {"learning_rate": 3e-3, "max_steps": 2000}, sample=sample)``, then
        ``Fit.from_config(run).train(resume_from_checkpoint=run.resume)``, and ``sample(..., **run.own["sample"])``.
    """
    from .targets import name_of, target_of

    target = target_of(name_of(build), build, data, arguments or {})
    says = inspect.getdoc(sys.modules[build.__module__]) or ""
    command = Command(sys.argv[0].rpartition("/")[2], says.split("\n\n")[0], functions=functions)
    return command.read(sys.argv[1:] if words is None else words, target)


@dataclass(frozen=True)
class Typed:
    """The words of a command line as the parser takes them, the names of options among them, and what is wrong."""

    words: list[str]
    names: set[str]
    problems: list[str]


def translated(words: Iterable[str], options: Iterable[Option], has_target: bool, chosen: Mapping[str, str]) -> Typed:
    """Turn words into those that the parser takes: names with "_" for "-" and "__" for ".", flags with their "true".

    Args:
        words: of the command line.
        options: that there are.
        has_target: whether something names what makes the module.
        chosen: the strategy and the precision, for messages.
    """
    kinds = {option.name: option.kind for option in options}
    commands = {"config", PRINT, "resume", "help"}
    given = list(words)
    found, names, problems = list[str](), set[str](), list[str]()
    for number, word in enumerate(given):
        if not word.startswith("--") or word == "--":
            found.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in kinds and name not in commands:
            problems.append(f"{flag}: {unknown_name(name, kinds, chosen, has_target)}")
        names.add(name)
        if name == PRINT:
            continue
        found.append(f"--{inner(name)}{equals}{value}")
        follows = given[number + 1] if number + 1 < len(given) else "--"
        if kinds.get(name) in (bool, bool | None, bool | str) and not equals and follows.startswith("--"):
            found.append("true")
    return Typed(found, names, problems)


def types_problems(parser: Any, values: Mapping[str, Any], places: Mapping[str, str]) -> list[str]:
    """Say which values of files are of another type than their option, but those of FitArguments, which checks its own.

    Args:
        parser: of the options.
        values: of files.
        places: where they stand.
    """
    fields, problems = hints(FitArguments), []
    for name, value in values.items():
        if name not in fields:
            try:
                parser.parse_object({inner(name): value})
            except ConfigurationError as error:
                problems += [f"{places[name]}: {each.removeprefix('--')}" for each in error.problems]
    return problems


def values_of(words: Sequence[str], name: str) -> list[str]:
    """Return the values that a command line gives an option, in their order."""
    found = []
    for number, word in enumerate(words):
        if word == f"--{name}" and number + 1 < len(words):
            found.append(words[number + 1])
        elif word.startswith(f"--{name}="):
            found.append(word.partition("=")[2])
    return found


def printed(run: Configuration) -> str:
    """Return a configuration as ``--print_config`` prints it."""
    values = {name: value for name, value in run.values.items() if can_be_written(value)}
    return text_of(values, run.target.name if run.target is not None else "")


def section_of(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return the options of a section, without its name."""
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}


def inner(name: str) -> str:
    """Return the name of an option inside the parser, for which dots would be namespaces."""
    return name.replace(".", "__")


def dotted(text: str) -> str:
    """Return a text of the parser with the dots that names are written with, and without the names of functions."""
    # What stands beside an option on its line stays in its column.
    text = re.sub(r"^(  --\w+?)__(\w+ (?:VALUE|\{[\w,]*\}) )(?= *\S)", r"\1.\2 ", text, flags=re.MULTILINE)
    return re.sub(r"type:\s+<function\s+\w+\s+at\s+0x\w+>,\s+", "", text.replace("__", "."))


def plainly(message: str) -> str:
    """Return a message of the parser in our words: the option, its value, and what it must be."""
    found = re.search(r'key "([^"]+)".*?Expected an? (.*?)\. Got value: (.*)$', message, flags=re.DOTALL)
    if found is None:
        return message
    if words := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", found[2]):
        return f"--{found[1]}={found[3]!r}: must be one of {words[1]}"
    kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", found[2]).replace("typing.", "")
    return f"--{found[1]}={found[3]!r}: must be {kind}"


def end(parser: Any, message: str) -> NoReturn:
    """End the process with a message, and with a line that says where the options are listed."""
    print(f"{parser.prog}: {message}\nAll options: {parser.prog} --help", file=sys.stderr)
    sys.exit(2)
