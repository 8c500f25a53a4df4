"""Configuration: what a run is configured with, by files and a command line, and the arguments of Fit that makes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...precision.base import Precision
from ...strategies.base import Strategy
from ...strategies.launch import start_ranks
from ..arguments import ArgumentsError, FitArguments
from ..fields.argument_ranges import names_in
from ..fields.argument_types import hints
from ..fields.foreign_arguments import unknown_argument
from ..random_state import seed_everything
from .entries import ConfigurationError, Entry, read_entries
from .options import (
    Option,
    defaults_under,
    devices,
    flat,
    known_options,
    make_precision,
    make_strategy,
    precision_class,
    strategy_class,
)
from .targets import GIVEN, Target, load_target

WORDS = "strategy", "precision", "devices", "max_restarts"  # of Fit itself
OF_FIT = "args", "loggers", "profiler"  # taken as they are given
UNUSED = {"strategy": "single", "precision": "32-true"}  # what is taken where there is no word
TARGET, GIVEN_BY_PROGRAM = "target", "given_by_program"  # what a file holds beside options


@dataclass(frozen=True)
class Built:
    """What made a run's module and data, for the file that repeats it.

    Attributes:
        target: "train.py:build"; empty where the function has no name.
        build, data: the options that the functions were given.
    """

    target: str
    build: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Configuration:
    """A run as it is configured.

    Attributes:
        values: by the names of options: "learning_rate", "strategy", "strategy.replicas", "build.width".
        target: what makes the module and the data; None where the program gives them.
        places: where in a file a value stands.
        given_by_program: arguments of Fit that the run had, which was written down, and that no file can hold.
        resume: what ``train(resume_from_checkpoint=)`` is told.
        own: options of functions of the program's own, by the name of each; see ``configure``.

    Example:
        ``Configuration.read("output/first/config.yaml").values["learning_rate"]``
    """

    values: Mapping[str, Any]
    target: Target | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    given_by_program: tuple[str, ...] = ()
    resume: bool | str | None = None
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, *paths: str | Path, target: Target | None = None, arguments: type = FitArguments) -> "Configuration":
        """Read files, each of which overrides the ones before it.

        Args:
            paths: of YAML, TOML or JSON.
            target: in place of the one that a file names.
            arguments: FitArguments, or a class that derives from it.

        Raises:
            ConfigurationError: what is wrong, all of it, with files and lines.
        """
        entries = standing([entry for path in paths for entry in read_entries(path)])
        held = {entry.key: entry for entry in entries}
        if target is None and TARGET in held:
            target = target_at(held[TARGET])
        defaults = flat(target.defaults) if target is not None else {}
        options = options_under(entries, defaults, target)
        problems = names_problems(entries, defaults, options, target, words_in(entries, defaults), arguments)
        values = {key: entry.value for key, entry in held.items() if key not in (TARGET, GIVEN_BY_PROGRAM)}
        given = held[GIVEN_BY_PROGRAM].value if GIVEN_BY_PROGRAM in held else ()
        places = {key: entry.place for key, entry in held.items()}
        kept = defaults_under(defaults, **words_in(entries, defaults))
        found = cls({**kept, **values}, target, places, tuple(given))
        if problems:
            raise ConfigurationError([*problems, *found.argument_problems(arguments())])
        return found

    def with_values(self, values: Mapping[str, Any]) -> "Configuration":
        """The configuration with other values, which override its own. Another strategy, or precision, drops the
        options of the one that it replaces.
        """
        kept = {
            name: value
            for name, value in self.values.items()
            if "." not in name
            or (section := name.partition(".")[0]) not in UNUSED
            or values.get(section, self.values.get(section)) == self.values.get(section)
        }
        places = {name: place for name, place in self.places.items() if name not in values}
        return replace(self, values={**kept, **values}, places=places)

    def section(self, name: str) -> dict[str, Any]:
        """Return the options of a section, without its name."""
        begins = f"{name}."
        return {key[len(begins) :]: value for key, value in self.values.items() if key.startswith(begins)}

    def fit_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of Fit. Where the target makes the module, the ranks are started first, so that it is
        made on them alone, and random numbers begin with the run's seed.

        Args:
            given: arguments of Fit that override the configuration.

        Raises:
            ConfigurationError: what can't work, all of it, with files and lines.
            TypeError: Fit has no argument of a name in ``given``.
        """
        base = given.get("args") or FitArguments()
        own = {name: given[name] for name in GIVEN if given.get(name) is not None}
        made = {name: value for name, value in given.items() if isinstance(value, Strategy | Precision)}
        rest = {name: value for name, value in given.items() if name not in (*GIVEN, *made, *OF_FIT)}
        known = {*hints(type(base)), *WORDS, *GIVEN, *OF_FIT}
        if unknown := [name for name in rest if name not in known]:
            raise TypeError(unknown_argument(unknown[0], known))
        run = self.with_values({**flat(rest), **{name: UNUSED[name] for name in made}})
        strategy, precision, args = run._check(base)
        words: dict[str, Any] = {
            "strategy": made.get("strategy", strategy),
            "precision": made.get("precision", precision),
            "devices": devices(run.values.get("devices", "auto")),
            "max_restarts": run.values.get("max_restarts", 0),
            "loggers": given.get("loggers", run.values.get("loggers", ("jsonl",))),
            "profiler": given.get("profiler", run.values.get("profiler")),
        }
        built = None
        if run.target is not None and not own.keys() & {"module", "module_init"}:
            signals = names_in(args.preemption_signals)
            start_ranks(words["strategy"], words["devices"], words["max_restarts"], signals=signals)
            seed_everything(args.seed)
            build, data = run.section("build"), run.section("data")
            own = {**run.target.make(build, data), **own}
            built = Built(run.target.name, build, data)
        missing = [name for name in self.given_by_program if name not in own and name not in given]
        if missing:
            raise ConfigurationError(
                [
                    f"{self.places.get(GIVEN_BY_PROGRAM, GIVEN_BY_PROGRAM)}: the run was given {', '.join(missing)} by "
                    f"its program, which no file can hold. Pass {missing[0]}=... (None or () for none)."
                ]
            )
        return {**own, **words, "args": args, "built_by": built}

    def _check(self, base: FitArguments) -> tuple[Any, Any, FitArguments]:
        """Make strategy, precision and arguments, and refuse all that can't work together."""
        problems: list[str] = []
        made: dict[str, Any] = {}
        makers: dict[str, Any] = {"strategy": make_strategy, "precision": make_precision}
        for word, make in makers.items():
            try:
                made[word] = make(self.values.get(word, UNUSED[word]), self.section(word))
            except (ValueError, TypeError, ImportError) as error:
                problems.append(self._placed(word, str(error)))
        problems += self.argument_problems(base)
        if problems:
            raise ConfigurationError(problems)
        return made["strategy"], made["precision"], base.replace(**self._fields(base))

    def argument_problems(self, base: FitArguments) -> list[str]:
        """Say which fields can't work, each with its place.

        Args:
            base: whose fields the configuration overrides.
        """
        try:
            base.replace(**self._fields(base))
        except ArgumentsError as error:
            return [self._placed(name, f"{name}={value!r}: {why}") for name, value, why in error.problems]
        except ValueError as error:  # options that are no mapping
            return [str(error)]
        return []

    def _fields(self, base: FitArguments) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if name in hints(type(base))}

    def _placed(self, name: str, what: str) -> str:
        return f"{self.places[name]}: {what}" if name in self.places else what


def target_at(entry: Entry) -> Target:
    """Load the target that a file names: by a path from here, or from the file's own folder.

    Raises:
        ConfigurationError: there is none.
    """
    name, beside = str(entry.value), Path(entry.file).parent
    path = name.rpartition(":")[0]
    if path.endswith(".py") and not Path(path).expanduser().exists() and (beside / path).exists():
        name = f"{beside / name}"
    try:
        return load_target(name)
    except ValueError as error:
        raise ConfigurationError([f"{entry.place}: {error}"]) from error


def standing(entries: Iterable[Entry]) -> list[Entry]:
    """Return entries without the options of a strategy, or precision, that a later file, or an option, replaces."""
    kept, words = list[Entry](), dict[str, Any]()
    for entry in entries:
        if entry.key in UNUSED and words.setdefault(entry.key, entry.value) != entry.value:
            words[entry.key] = entry.value
            kept = [each for each in kept if each.file == entry.file or not each.key.startswith(f"{entry.key}.")]
        kept.append(entry)
    return kept


def words_in(entries: Iterable[Entry], defaults: Mapping[str, Any]) -> dict[str, str]:
    """Return the strategy and the precision that entries choose; the last one counts."""
    chosen = {entry.key: entry.value for entry in entries if entry.key in UNUSED}
    return {word: str(chosen.get(word, defaults.get(word, otherwise))) for word, otherwise in UNUSED.items()}


def options_under(entries: Sequence[Entry], defaults: Mapping[str, Any], target: Target | None) -> list[Option]:
    """Return the options of a run under the strategy and precision that entries choose.

    Raises:
        ConfigurationError: there is no such strategy or precision. What else is wrong is said with it, but for options
            of what isn't there.
    """
    words, problems = words_in(entries, defaults), list[str]()
    for word, find in (("strategy", strategy_class), ("precision", precision_class)):
        try:
            find(words[word])
        except (ValueError, ImportError) as error:
            places = [entry.place for entry in entries if entry.key == word]
            problems.append(f"{places[-1]}: {error}" if places else str(error))
            words[word] = UNUSED[word]
    options = known_options(target, words["strategy"], words["precision"])
    if problems:
        rest = [entry for entry in entries if entry.key.partition(".")[0] not in UNUSED]
        places_of = {entry.key: entry.place for entry in rest}
        others = Configuration({entry.key: entry.value for entry in rest}, target, places_of)
        problems += names_problems(rest, {}, options, target, words)
        raise ConfigurationError([*problems, *others.argument_problems(FitArguments())])
    return options


def names_problems(
    entries: Sequence[Entry],
    defaults: Mapping[str, Any],
    options: Iterable[Option],
    target: Target | None,
    words: Mapping[str, str],
    arguments: type = FitArguments,
) -> list[str]:
    """Say which entries have the name of no option, and what to write instead.

    Args:
        entries: of files.
        defaults: of the target's file.
        options: that there are.
        target: what makes the module and the data.
        words: the strategy and the precision that count.
        arguments: FitArguments, or a class that derives from it.
    """
    known = {option.name for option in options} | set(hints(arguments))
    has_target = target is not None
    own = [name for name in defaults_under(defaults, **words) if name not in known]
    return [f"the program's own defaults: {unknown_name(name, known, words, has_target)}" for name in own] + [
        f"{entry.place}: {unknown_name(entry.key, known, words, has_target)}"
        for entry in entries
        if entry.key not in known and entry.key not in (TARGET, GIVEN_BY_PROGRAM)
    ]


def unknown_name(key: str, known: Iterable[str], words: Mapping[str, str], has_target: bool) -> str:
    """Say what is wrong with a name, and what to write instead."""
    section, dot, option = key.partition(".")
    below = sorted(name for name in known if name.endswith(f".{key}"))
    if key in ("build", "data"):
        return f"{key!r} holds the options of your {key}(), by name: {{name: value}}."
    if not dot and below:
        return f"{key!r} belongs to a section: write {' or '.join(map(repr, below))}."
    if not dot:
        return unknown_argument(key, [name for name in known if "." not in name])
    siblings = [name.partition(".")[2] for name in known if name.startswith(f"{section}.")]
    if section in words:
        return unknown_argument(option, siblings, f"{section}={words[section]!r}")
    if section in ("build", "data") and not has_target:
        return f"{key!r} is an option of a function that nothing names. Write {TARGET}: train.py:build."
    if section in ("build", "data"):
        return unknown_argument(option, siblings, f"{section}()")
    return unknown_argument(key, known)
