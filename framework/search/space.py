"""From a trial to arguments: which of its parameters are FitArguments, and a run with them."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .. import fresh
from ..agreement import check_ranks_agree
from ..arguments import FitArguments
from .options import import_optuna

if TYPE_CHECKING:
    from ..fit import Fit


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


def begin_trial(fit: "Fit", trial: Any) -> None:
    """Let the next run be a trial's: with its arguments and, where the Fit has a ``module_init``, a fresh module.

    Args:
        fit: between two runs.
        trial: a mapping, or a trial of Optuna. Parameters that ``module_init`` asks for needn't be arguments.

    Raises:
        TypeError: a parameter is no argument; the message suggests the nearest.
        ValueError: a value is of the wrong type or out of its range, or the ranks were given different trials.
    """
    if fit.module_init is None:
        args = fit.requested.replace(**parameters(trial))
        module = None
    else:
        optuna = import_optuna()
        asked = Recorded(optuna.trial.FixedTrial(dict(trial)) if isinstance(trial, Mapping) else trial)
        # Where the seed is one of the parameters, it is that of the module too.
        module = fresh.make_module(fit.module_init, asked, parameters(trial).get("seed", fit.requested.seed))
        known = {field.name for field in fields(FitArguments)}
        given = parameters(trial)
        args = fit.requested.replace(**{n: v for n, v in given.items() if n in known or n not in asked.names})
    check_ranks_agree(fit.strategy, {"argument of the trial": args.to_dict()})
    if module is not None:
        fresh.check(fit, args, module)
        if fit.placed:
            fresh.take_apart(fit)
        fresh.begin_afresh(fit, args, module)
    elif args != fit.running:
        fresh.change_arguments(fit, args)


def begin_own(fit: "Fit") -> None:
    """Let the next run be the Fit's own again, after one of a trial."""
    if fit.module_init is None:
        fresh.change_arguments(fit, fit.requested)
        return
    module = fresh.make_module(fit.module_init, fit.own_trial, fit.requested.seed)
    fresh.take_apart(fit)
    fresh.begin_afresh(fit, fit.requested, module)


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
