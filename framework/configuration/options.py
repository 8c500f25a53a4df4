"""The options of a run: each with its name, type, default, documentation and subject, wherever it is declared."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...precision.base import Precision
from ...precision.registry import ALIASES as PRECISION_ALIASES
from ...precision.registry import PRECISIONS, class_of, get_precision
from ...strategies.base import Strategy
from ...strategies.registry import ALIASES as STRATEGY_ALIASES
from ...strategies.registry import STRATEGIES, get_strategy
from ..arguments import FitArguments
from ..fields.argument_ranges import ONE_OF
from ..fields.argument_types import Options, descriptions, hints, load, read_options
from ..fields.subjects import by_subject
from ..loggers import LOGGERS
from .targets import REQUIRED, Target, parameters_of

PLACEMENT = "placement and number format"
PROFILERS = "simple", "torch"
"""The words of ``framework/profiling``, which stands above this room."""


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: with a dot where it belongs to a section: "learning_rate", "strategy.replicas", "build.width".
        kind: its type, or a function that reads it from text.
        default: REQUIRED where there is none.
        says: its documentation.
        subject: the title that it stands under.
    """

    name: str
    kind: Any
    default: Any
    says: str
    subject: str


def names(given: Any) -> list[str]:
    """Read names with commas between them, or a list of them: the type of ``--loggers``."""
    if isinstance(given, str):
        given = given.strip("[] ").split(",")
    return [str(name).strip(" '\"") for name in given if str(name).strip()]


def devices(given: Any) -> int | str:
    """Read a number of ranks, a range ("1:2") or "auto": the type of ``--devices``."""
    return int(given) if isinstance(given, str) and given.isdecimal() else given


def options_by_name(given: Any) -> dict[str, Any]:
    """Read options from a mapping, JSON, or "name=value,name=value": the type of ``--optim_args``."""
    if isinstance(given, str):
        return read_options(given)
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    raise ValueError(f"options are a mapping, JSON or name=value. Received: {given!r}")


def fit_options() -> list[Option]:
    """Return the options that every run has."""
    strategies, formats = ", ".join([*STRATEGIES, *STRATEGY_ALIASES]), ", ".join([*PRECISIONS, *PRECISION_ALIASES])
    found = [
        Option("strategy", str, "single", f"where the module runs: {strategies}; or the path of a class", PLACEMENT),
        Option("precision", str, "32-true", f"number format: {formats}; or the path of a class", PLACEMENT),
        Option("devices", devices, "auto", "ranks on this machine; auto takes one for each accelerator", PLACEMENT),
        Option("max_restarts", int, 0, "how often ranks are started again after one failed", PLACEMENT),
        Option("loggers", names, ["jsonl"], f"where logs go, with commas between them: {', '.join(LOGGERS)}",
               "where results go"),
        Option("profiler", Literal[PROFILERS] | None, None,
               "where the time goes: torch (traces of some updates) or simple (the time of each phase)",
               "where results go"),
    ]  # fmt: skip
    said, kinds, defaults = descriptions(FitArguments), hints(FitArguments), FitArguments()
    for subject, fields in by_subject(FitArguments).items():
        for name in fields:
            kind = options_by_name if kinds[name] == Options else kinds[name]
            kind = Literal[ONE_OF[name]] if name in ONE_OF else kind
            default = getattr(defaults, name)
            found.append(Option(name, kind, default, said[name].replace("``", ""), subject))
            if name == "full_determinism":
                found.append(Option("deterministic", bool | None, None, f"the same as {name}", subject))
    return found


def target_options(target: Target | None) -> list[Option]:
    """Return the options of the functions that make the module and the data. A parameter of ``data`` that ``build``
    has, too, is one option of both.
    """
    if target is None:
        return []
    found = options_of("build", target.build, f"your {target.build.__name__}()")
    if target.data is not None:
        taken = {option.name.partition(".")[2] for option in found}
        own = options_of("data", target.data, f"your {target.data.__name__}()")
        found += [option for option in own if option.name.partition(".")[2] not in taken]
    return found


def options_of(section: str, called: Callable[..., Any], subject: str) -> list[Option]:
    """Return the options that are the parameters of a function or class."""
    parameters = parameters_of(called).items()
    return [Option(f"{section}.{name}", kind, default, says, subject) for name, (kind, default, says) in parameters]


def strategy_options(name: str) -> list[Option]:
    """Return the options of a strategy.

    Raises:
        ValueError: there is no strategy of that name.
    """
    options = strategy_class(name).Options
    said: dict[str, str] = {}
    for base in reversed(options.__mro__):
        if "Args:\n" in (base.__doc__ or ""):
            said |= descriptions(base)
    own = own_options(STRATEGIES, STRATEGY_ALIASES, name)
    return [
        Option(
            f"strategy.{each.name}",
            hints(options)[each.name],
            own.get(each.name, default_of(each)),
            said.get(each.name, "").replace("``", ""),
            f"options of strategy {name}",
        )
        for each in dataclasses.fields(options)
    ]


def precision_options(name: str) -> list[Option]:
    """Return the options of a precision.

    Raises:
        ValueError: there is no precision of that name.
    """
    return options_of("precision", precision_class(name), f"options of precision {name}")


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of a strategy, by a word or by its path "package.module.Class"."""
    return class_at(name, Strategy) if "." in name else type(get_strategy(name))


def precision_class(name: str) -> type[Precision]:
    """Return the class of a precision, by a word or by its path; it can be asked where none can be made here."""
    if "." in name:
        return class_at(name, Precision)
    known = PRECISION_ALIASES.get(name, name)
    return class_of(known) if known in PRECISIONS else type(get_precision(name))


def class_at(path: str, base: type) -> Any:
    """Import a class.

    Raises:
        ValueError: there is none at that path, or it is no class of the kind.
    """
    found = load(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{path} is no class of a {base.__name__}.")
    return found


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """Make a strategy of its name and options."""
    if not options and "." not in name:
        return get_strategy(name)
    return strategy_class(name)(**{**own_options(STRATEGIES, STRATEGY_ALIASES, name), **options})


def make_precision(name: str, options: Mapping[str, Any]) -> Precision:
    """Make a precision of its name and options."""
    return precision_class(name)(**options) if options or "." in name else get_precision(name)


def own_options(table: Mapping[str, Any], aliases: Mapping[str, str], name: str) -> Mapping[str, Any]:
    """Return the options that a name itself stands for: "deepspeed_stage_2"."""
    known: Mapping[str, Any] = table.get(aliases.get(name, name), ("", {}))[1]
    return known


def default_of(field: Any) -> Any:
    """Return the default of a dataclass's field."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else REQUIRED


def known_options(target: Target | None, strategy: str, precision: str) -> list[Option]:
    """Return all options of a run under a strategy and a precision, with the defaults of the target's file.

    Raises:
        ValueError: there is no such strategy or precision, or the file's defaults have an unknown name.
    """
    found = [*fit_options(), *strategy_options(strategy), *precision_options(precision), *target_options(target)]
    defaults = defaults_under(flat(target.defaults if target is not None else {}), strategy, precision)
    return [dataclasses.replace(each, default=defaults.get(each.name, each.default)) for each in found]


def defaults_under(defaults: Mapping[str, Any], strategy: str, precision: str) -> dict[str, Any]:
    """Return a program's own defaults without the options of a strategy, or precision, that another one replaces."""
    chosen = {"strategy": strategy, "precision": precision}
    return {
        name: value
        for name, value in defaults.items()
        if (section := name.partition(".")[0]) not in chosen or defaults.get(section) == chosen[section]
    }


def flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return Fit's arguments as values of options: an instance of a strategy or precision by its name and options."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Strategy):
            found |= described("strategy", value.name, options_of_strategy(value))
        elif isinstance(value, Precision):
            found |= described("precision", value.name, options_of_precision(value))
        else:
            found[name] = value
    return found


def described(section: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a name and its options as values."""
    return {section: name, **{f"{section}.{option}": value for option, value in options.items()}}


def options_of_strategy(strategy: Strategy) -> dict[str, Any]:
    """Return the options with which a strategy was made, where they aren't its defaults."""
    fields = dataclasses.fields(type(strategy).Options)
    held = {each.name: (getattr(strategy.options, each.name), default_of(each)) for each in fields}
    return {name: value for name, (value, default) in held.items() if value is not default and value != default}


def options_of_precision(precision: Precision) -> dict[str, Any]:
    """Return the options with which a precision was made, where they aren't its defaults: it keeps them by name."""
    # Of the class itself, Python 3.10 would give those of __new__, which Precision has.
    made_by = type(precision).__init__
    parameters = [] if made_by is object.__init__ else [*inspect.signature(made_by).parameters.values()][1:]
    held = {each.name: (getattr(precision, each.name, each.default), each.default) for each in parameters}
    return {name: value for name, (value, default) in held.items() if value is not default and value != default}


def sections(options: Iterable[Option]) -> tuple[str, ...]:
    """Return the names before the dots, in their order."""
    return tuple(dict.fromkeys(option.name.partition(".")[0] for option in options if "." in option.name))
