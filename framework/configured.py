"""Configured: a Fit as a file, or a command line, configures it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .arguments import FitArguments
from .module import TrainModule
from .strategy_choice import StrategyChoice

if TYPE_CHECKING:
    from .configuration.configuration import Configuration
    from .planning.plan import RunPlan

Made = TypeVar("Made", bound="Configured")


class Configured(StrategyChoice):
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

    @classmethod
    def plan_run(
        cls,
        config: "str | Path | Configuration",
        *,
        world: int = 1,
        device: str = "h100-80gb",
        nodes: int | None = None,
        margin: float = 0.1,
        **arguments: Any,
    ) -> "RunPlan":
        """Plan a run: what a rank holds, sends and computes in an update, before there is a machine for it.

        Ranks are played in processes of their own, with tensors that have no memory; nothing is trained, no weight is
        allocated, and nothing of this process is touched. See docs/plan.md.

        Args:
            config: what makes the module, as "train.py:build"; or the path of a file that names it.
            world: ranks.
            device: that each rank has: "h100-80gb", "cpu", ..., or figures ("80GiB,989e12,3.35e12,450e9,50e9").
            nodes: that the ranks lie on; None puts eight on each.
            margin: the part of the device's memory that is to stay free.
            **arguments: of Fit, and options of the functions ("build.width"), which override the configuration.

        Raises:
            ValueError: the run can't be planned; says why and what to write instead.

        Example:
            ``Fit.plan_run("train.py:build", world=64, strategy="fsdp2", precision="bf16-mixed").fits``
        """
        from .configuration.configuration import Configuration
        from .configuration.entries import FILES
        from .configuration.options import flat
        from .configuration.targets import load_target, name_of
        from .planning.asking import plan_of

        if isinstance(config, str) and not config.endswith(FILES):
            target = load_target(config)
            config = Configuration(flat(target.defaults), target)
        elif not isinstance(config, Configuration):
            config = Configuration.read(config)
        given = config.with_values(flat(arguments))
        return plan_of(given, world, device, nodes, margin, fit=name_of(cls))
