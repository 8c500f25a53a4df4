"""What the display reads of a Fit."""

from typing import Any, Protocol

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..callbacks import Callbacks
from ..module import TrainModule
from ..state import Control, TrainState


class ShownFit(Protocol):
    """A Fit, as far as the display knows it.

    Attributes:
        strategy: set up.
        callbacks, state, control: of the Fit.
    """

    strategy: Strategy
    callbacks: Callbacks
    state: TrainState
    control: Control

    @property
    def args(self) -> FitArguments:
        """The arguments of the run."""

    @property
    def module(self) -> TrainModule:
        """The module, placed or not."""

    @property
    def placed(self) -> bool:
        """Whether the module was given to the strategy."""

    @property
    def placement(self) -> Any:
        """The module where it runs; ``run/placement.py``."""

    @property
    def run(self) -> Any:
        """The run that is under way, or was the last; ``run/run.py``."""
