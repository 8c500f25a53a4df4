"""What a checkpoint is taken of, and given back to."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...strategies.base import Strategy
from ..arguments import FitArguments
from ..callbacks import Callbacks
from ..module import TrainModule
from .log_history import HistoryPart


class SavedRun(Protocol):
    """A run, as far as a checkpoint knows it (``run/run.py``).

    Attributes:
        args: of the run.
        strategy: holds the placed module and its optimizer.
        callbacks: those with a state are saved.
    """

    args: FitArguments
    strategy: Strategy
    callbacks: Callbacks

    @property
    def module(self) -> TrainModule:
        """The module, placed."""

    @property
    def optimizer(self) -> Optimizer:
        """The strategy's optimizer."""

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizer of each turn; that of a run without turns by the name ""."""

    @property
    def schedules(self) -> Mapping[str, LRScheduler]:
        """The schedule of each of them."""

    def fingerprints(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fingerprints of frozen tensors, by name. Collective."""

    def take_history(self) -> HistoryPart | None:
        """The logs so far; None where this isn't the main process, which writes them."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes between two updates, but tensors, as JSON types. Collective."""

    def rank_state(self) -> dict[str, Any]:
        """What of the state is this rank's alone, as JSON types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
