"""What a search knows of the Fit that it trains again and again."""

from collections.abc import Iterable
from typing import Any, Protocol

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..callbacks import Callback, Callbacks
from ..loggers.together import Loggers
from ..module import TrainModule
from ..run.source import Source
from ..state import TrainOutput, TrainState


class SearchedFit(Protocol):
    """A Fit, as far as a search knows it; ``runs.py`` says what its methods do.

    Attributes:
        train_data, eval_data: as they were given.
        strategy: set up.
        source: where modules come from.
        callbacks, loggers, state: of the Fit.
        own_args, own_trial: what the Fit trains with where no trial changes it.
    """

    train_data: Any
    eval_data: Any
    strategy: Strategy
    source: Source
    callbacks: Callbacks
    loggers: Loggers
    state: TrainState
    own_args: FitArguments
    own_trial: Any

    @property
    def placed(self) -> bool:
        """Whether the module was given to the strategy."""

    def make_module(self, trial: Any, seed: int) -> TrainModule | None:
        """Make a fresh module for a trial, where there is a ``module_init``."""

    def begin_afresh(self, args: FitArguments, module: TrainModule | None, callbacks: Iterable[Callback]) -> None:
        """Have the next run follow other arguments, with another module."""

    def train_trial(self) -> TrainOutput:
        """Train, from the trial's newest checkpoint on where there is one."""

    def take_apart(self) -> None:
        """Undo what a run made, and what placing did."""

    def take_own(self, args: FitArguments, trial: Any) -> None:
        """Have arguments, and what ``module_init`` is asked, be the Fit's own from here on."""
