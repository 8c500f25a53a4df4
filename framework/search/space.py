"""From a trial to the arguments of a run, and to its module: which of its parameters are which."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ..arguments import FitArguments
from ..module import TrainModule
from ..run.source import Source
from .options import import_optuna


class Recorded:
    """A trial that remembers which parameters it was asked for.

    Args:
        trial: of Optuna.
    """

    def __init__(self, trial: Any) -> None:
        self.trial = trial
        self.names: set[str] = set()

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self.trial, attribute)
        return self._recording(value) if attribute.startswith("suggest_") else value

    def _recording(self, suggest: Callable[..., Any]) -> Callable[..., Any]:
        def recording(name: str, *args: Any, **options: Any) -> Any:
            self.names.add(name)
            return suggest(name, *args, **options)

        return recording


def arguments_and_module(trial: Any, own: FitArguments, source: Source) -> tuple[FitArguments, TrainModule | None]:
    """The arguments of a trial's run and, where there is a ``module_init``, its fresh module, else None.

    Args:
        trial: a mapping, or a trial of Optuna. Parameters that ``module_init`` asks for needn't be arguments.
        own: the Fit's arguments, which the trial changes.
        source: where modules come from.

    Raises:
        TypeError: a parameter is no argument; the message suggests the nearest.
        ValueError: a value is of the wrong type or out of its range.
    """
    given = parameters(trial)
    if source.module_init is None:
        return own.replace(**given), None
    optuna = import_optuna()
    asked = Recorded(optuna.trial.FixedTrial(dict(trial)) if isinstance(trial, Mapping) else trial)
    # Where the seed is one of the parameters, it is that of the module too.
    module = source.make(asked, given.get("seed", own.seed))
    known = {field.name for field in fields(FitArguments)}
    given = parameters(trial)  # the module may have asked for more
    return own.replace(**{n: v for n, v in given.items() if n in known or n not in asked.names}), module


def parameters(trial: Any) -> dict[str, Any]:
    """The parameters of a mapping, or of a trial of Optuna's; a FixedTrial has those too that nobody asked it for yet.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(trial, Mapping):
        return dict(trial)
    optuna = import_optuna()
    if isinstance(trial, optuna.trial.FixedTrial):
        return dict(trial._params)
    if isinstance(trial, optuna.trial.BaseTrial):
        return dict(trial.params)
    raise TypeError(f"trial takes arguments by name, or a trial of Optuna. Received: {trial!r:.200}")


def sampled(space: Any, trial: Any) -> dict[str, Any]:
    """The arguments that a space gives for a trial.

    Args:
        space: a function, or distributions by name, from which the trial was asked already.
        trial: of Optuna.

    Raises:
        TypeError: the function returned no mapping.
    """
    if isinstance(space, Mapping):
        return {name: trial.params[name] for name in space}
    arguments = space(trial)
    if not isinstance(arguments, Mapping):
        raise TypeError(
            "space must return a mapping of FitArguments' names to values, such as {'learning_rate': "
            f"trial.suggest_float('learning_rate', 1e-5, 1e-1, log=True)}}. It returned: {arguments!r:.200}"
        )
    return dict(arguments)
