"""Configured: a Fit as a file, or a command line, configures it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .arguments import FitArguments
from .module import TrainModule
from .rate_finding import RateFinding

if TYPE_CHECKING:
    from .configuration.configuration import Configuration

Made = TypeVar("Made", bound="Configured")


class Configured(RateFinding):
    """What makes a Fit of a configuration."""

    @classmethod
    def from_config(
        cls: type[Made],
        config: "str | Path | Configuration",
        module: TrainModule | None = None,
        train_data: Any = None,
        eval_data: Any = None,
        **arguments: Any,
    ) -> Made:
        """Make a Fit as a file, or a command line, configures it.

        Where the configuration names a target ("train.py:build"), its functions make the module and the data, on the
        ranks alone, after random numbers were seeded with the run's seed. ``output_dir/config.yaml``, which every run
        that saves or has a report leaves, repeats that run, to the bit on the same machine.

        Args:
            config: the path of a file (YAML, TOML), or what ``configure`` read from a command line.
            module, train_data, eval_data: in place of the target's, or where it names none.
            **arguments: all others of Fit, which override the configuration.

        Raises:
            ConfigurationError: what can't work, all of it, with files and lines; it is a ValueError.

        Example:
            ``fit = Fit.from_config("run.yaml", module, dataset, learning_rate=3e-4)``
        """
        from .configuration.configuration import Configuration

        given = {"module": module, "train_data": train_data, "eval_data": eval_data}
        given = {name: value for name, value in given.items() if value is not None} | arguments
        if not isinstance(config, Configuration):
            config = Configuration.read(config, arguments=type(arguments.get("args") or FitArguments()))
        return cls(**config.fit_arguments(given))
