"""Members: what a Fit has, as far as its steps need it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..strategies.base import Strategy
from . import checkpoint
from .arguments import FitArguments
from .callbacks import Callbacks
from .data import DataStream
from .in_run import OfRun
from .labelling import Labelled
from .loggers.base import LoggedChoice
from .loggers.together import Loggers
from .measures.memory import MemoryByStage
from .measures.tokens import TokenCounter
from .module import TrainModule
from .objective import Objective
from .run.placement import Placement
from .run.plan import Plan
from .run.run import Run
from .run.source import Source
from .state import Control, TrainState
from .turns import Turns
from .watch.watch import Watch

if TYPE_CHECKING:
    from .run.cached_representations import CachedRepresentations


class Members(Labelled):
    """The objects of a Fit; those of a run are there when it has begun.

    Attributes:
        strategy: set up.
        choice: why it is this one, where it was chosen for the Fit; None where it was named.
        plan: the arguments of the run, and its length.
        source: where the module comes from.
        state, control: progress, and the flags that callbacks set.
    """

    strategy: Strategy
    choice: LoggedChoice | None = None
    plan: Plan
    train_data: Any
    eval_data: Any
    data_collator: Callable[[list[Any]], Any] | None
    compute_metrics: Callable[[Any, Tensor], Mapping[str, float]] | None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None
    callbacks: Callbacks
    loggers: Loggers
    state: TrainState
    control: Control
    memory: MemoryByStage
    source: Source
    overrides_loss: bool
    override_divides: bool
    ignore_keys_for_eval: tuple[str, ...]
    _objective: Objective | None
    _cached: "CachedRepresentations | None"  # with contrastive_chunks
    _turns: Turns | None
    _count_tokens: TokenCounter
    _of_run: OfRun
    _placement: Placement | None
    _run: Run | None
    _saver: "checkpoint.Saver | None"
    _watch: Watch | None  # there while a run is under way

    @property
    def args(self) -> FitArguments:
        """The arguments of the run; ``max_steps`` is its length, where there is something to train on."""
        return self.plan.args

    @property
    def module(self) -> TrainModule:
        """The user's module. Its parameters may be sharded once it is placed."""
        return self.source.module

    @property
    def objective(self) -> Objective:
        """How a loss is found."""
        assert self._objective is not None
        return self._objective

    def begin_counters(self) -> None:
        """Have the module read where a run begins or goes on."""
        self.module._share_run(self._of_run)  # with layers that came late, too
        self._of_run.counters.begin(self.state.global_step, self.state.epoch, bool(self.args.torch_compile))

    def follow_counters(self) -> None:
        """Have the module read the run's progress as it is now, in forward and loss."""
        self._of_run.counters.follow(self.state.global_step, self.state.epoch, self.strategy.factor)

    @property
    def placed(self) -> bool:
        """Whether the module was given to the strategy."""
        return self._placement is not None

    @property
    def placement(self) -> Placement:
        """The module where it runs; places it first, where it isn't."""
        self.place()
        assert self._placement is not None
        return self._placement

    @property
    def run(self) -> Run:
        """The run that is under way, or was the last, or will be the next."""
        if self._run is None:
            raise ValueError("This Fit has no train_data. Pass train_data= to Fit.")
        return self._run

    @property
    def stream(self) -> DataStream:
        """The training data of this rank."""
        return self.run.stream

    @property
    def saver(self) -> "checkpoint.Saver":
        """What saves the run's checkpoints."""
        if self._saver is None:
            raise ValueError("There is nothing to save yet: a checkpoint holds a run. Call fit.train() first.")
        return self._saver

    def place(self) -> None:
        """Give the module to the strategy, once; its optimizer is made with it where there is something to train on."""
        if self._placement is None:
            if self.args.auto_find_batch_size:
                self.source.keep_copy()
            trains = self.train_data is not None
            self._placement = Placement(self.strategy, self.module, self.args, trains, self._turns)
