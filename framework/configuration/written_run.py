"""What a run's own configuration file holds beside its arguments, and the writing of it at the run's beginning."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...precision.base import Precision
from ...precision.names import Table
from ...precision.registry import PRECISIONS
from ...strategies.base import Strategy
from ...strategies.launch import local_ranks
from ...strategies.registry import STRATEGIES
from ..arguments import FitArguments
from ..checkpoint.run_directory import CONFIGURATION
from ..loggers import LOGGERS
from ..replacing import replace_file
from .configuration import Built
from .options import PROFILERS, options_of_precision, options_of_strategy
from .targets import GIVEN
from .writing import can_be_written, text_of, values_of_run

REPEATS = "What this run was configured with. stratagem fit --config {file} runs it again."
REPEATS_WITH = "What this run was configured with. Fit.from_config({file!r}, ...) runs it again."


class ConfigurationWarning(UserWarning):
    """A run's own configuration couldn't be written. Training goes on."""


@dataclass(frozen=True)
class WrittenRun:
    """What a run was configured with, beside its arguments.

    Attributes:
        strategy, precision: "name" and options.
        words: devices, max_restarts, loggers, profiler.
        built: what made the module and the data; None where the program did.
        given: arguments of Fit that a program alone can give.
    """

    strategy: Mapping[str, Any]
    precision: Mapping[str, Any]
    words: Mapping[str, Any]
    built: Built | None = None
    given: Sequence[str] = field(default_factory=tuple)

    def under(self, strategy: Strategy) -> "WrittenRun":
        """The same under another strategy, which a user could have named."""
        name = word_of(strategy, STRATEGIES)
        assert name is not None
        return dataclasses.replace(self, strategy={"name": name, **options_of_strategy(strategy)})

    def write(self, args: FitArguments) -> None:
        """Write ``config.yaml`` into the run's directory. Where that fails it is warned of: a run can do without."""
        path = Path(args.output_dir) / CONFIGURATION
        try:
            replace_file(path, self.text(args, path))
        except (OSError, TypeError) as error:
            warnings.warn(f"{path} can't be written: {error}. The run goes on.", ConfigurationWarning, stacklevel=2)

    def text(self, args: FitArguments, path: Path) -> str:
        """Return what the file at ``path`` holds."""
        values = values_of_run(args, self.strategy, self.precision, self.words)
        if self.built is None or not self.built.target:
            return text_of(values, given_by_program=self.given, heading=REPEATS_WITH.format(file=str(path)))
        for section, options in (("build", self.built.build), ("data", self.built.data)):
            values |= {f"{section}.{name}": value for name, value in options.items()}
        given = [name for name in self.given if name not in GIVEN]
        return text_of(values, self.built.target, given, REPEATS.format(file=path))


def written_by(fit: Any, max_restarts: int, loggers: Sequence[Any], built: Built | None) -> WrittenRun:
    """Return what the file of a Fit's runs holds.

    Args:
        fit: the Fit, whose strategy is set up.
        max_restarts, loggers: as it was given them.
        built: what made its module and data, where ``Fit.from_config`` did.
    """
    given = [name for name in GIVEN if has(fit, name)]
    words = [logger for logger in loggers if isinstance(logger, str) and logger in LOGGERS]
    if len(words) < len(loggers):
        given.append("loggers")
    profiler = fit.profiler
    word = None if profiler is None or profiler != type(profiler)() else profiler.name
    if profiler is not None and word not in PROFILERS:
        given.append("profiler")
    chosen: dict[str, dict[str, Any]] = {"strategy": {}, "precision": {}}
    for section, made, table, options in (
        ("strategy", fit.strategy, STRATEGIES, options_of_strategy),
        ("precision", fit.strategy.precision, PRECISIONS, options_of_precision),
    ):
        name, held = word_of(made, table), options(made)
        if name is None or not can_be_written(held):
            given.append(section)
            name, held = made.name, {}
        chosen[section] = {"name": name, **held}
    if len(dataclasses.fields(fit.args)) > len(dataclasses.fields(FitArguments)):  # fields of the user's own
        given.append("args")
    devices = local_ranks() if fit.strategy.needs_ranks else 1
    others = {"devices": devices, "max_restarts": max_restarts, "loggers": words, "profiler": word}
    return WrittenRun(chosen["strategy"], chosen["precision"], others, built, tuple(given))


def has(fit: Any, name: str) -> bool:
    """Return whether a Fit was given something that a program alone can give."""
    if name == "callbacks":
        return bool(fit.own_callbacks)
    if name in ("module", "module_init"):
        return (fit.source.module_init is not None) == (name == "module_init")
    return getattr(fit, name) is not None


def word_of(made: Strategy | Precision, table: Table) -> str | None:
    """Return the word, or the path, that a strategy or precision can be made by again; None where it has none."""
    kind = type(made)
    location = table.get(made.name, ("", {}))[0]
    if location is kind or (isinstance(location, str) and location.rpartition(":")[2] == kind.__name__):
        return made.name
    path = f"{kind.__module__}.{kind.__qualname__}"
    return None if kind.__module__ == "__main__" or "<" in path else path
