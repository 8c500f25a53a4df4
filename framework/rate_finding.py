"""RateFinding: tries updates before a run, to find a learning rate by them, and leaves the run as it was."""

import sys
from typing import TYPE_CHECKING

from . import checkpoint
from .arguments import FitArguments
from .callbacks import Callback
from .loggers.together import Loggers
from .measures.memory import MemoryByStage
from .printing import say
from .run.attempts import OutOfMemory, Standing, attempt
from .runs import Runs
from .state import TrainOutput
from .watch.watch import Watch

if TYPE_CHECKING:
    from .search.learning_rates import LearningRates


class RateFinding(Runs):
    """What a Fit does to try updates, and to find a learning rate."""

    _has_trained: bool

    def find_learning_rate(
        self, min: float = 1e-7, max: float = 1.0, updates: int = 100, *, diverged: float = 4.0
    ) -> "LearningRates":
        """Train for some updates while the learning rate rises, and see where the loss falls fastest (Smith, 2017).

        They are updates of the run as it will be: its strategy, precision, optimizer, batches and clipping. Afterwards
        all is as before, and ``train()`` computes the same bits as without this: module and buffers are given back from
        a copy on the host, random states too, and the optimizer, loss scale and data begin anew. Your callbacks and
        loggers hear nothing of it, and nothing is written. See docs/trying.md.

        Args:
            min, max: the first and the last rate; the rates between them rise by the same factor each.
            updates: how many.
            diverged: the sweep ends where the loss is more than so many times the lowest before, or isn't finite.

        Returns:
            The curve, a ``suggestion`` and ``plot(path)``; the same on every rank.

        Raises:
            ValueError: the module is placed already: this comes before ``train``, ``evaluate`` and ``predict``; or it
                is trained in turns, each of which has a rate of its own.
            TypeError: the module can't be copied.

        Example:
            >>> found = fit.find_learning_rate(updates=50)
            >>> found.plot("rates.png")
            PosixPath('rates.png')
            >>> better = Fit(Regressor(), train_data=dataset, learning_rate=found.suggestion)
        """
        from .search.learning_rates import (
            RateSweep,
            check_sweep,
            sweep_arguments,
        )  # who looks for none needn't import it

        check_sweep(min, max, updates, diverged)
        if self._turns is not None:
            raise ValueError(
                f"find_learning_rate raises one rate until one loss diverges, and {self._turns.listed_by} lists "
                f"several turns ({', '.join(self._turns.turns)}), whose losses follow one another. Give each a "
                "learning_rate= of its own, and compare runs, by hyperparameter_search for instance."
            )
        if self.placed or self._has_trained:
            raise ValueError(
                "find_learning_rate gives the module back as Fit was given it, and this one is placed already. Call it "
                "before train(), evaluate() and predict(), or on another Fit."
            )
        standing = Standing(self.strategy, self.run.stream)  # refuses to go without data
        if self.source.module_init is None:
            self.source.keep_copy()
        sweep = RateSweep(min, max, updates, diverged)
        try:
            self._try_out(sweep_arguments(self.own_args, updates), sweep)
        finally:
            standing.restore(self.strategy)
        found = sweep.found()
        if self.strategy.is_main:
            suggestion = "none: the loss never fell" if found.suggestion is None else f"{found.suggestion:.2g}"
            end = f"diverged at {found.rates[-1]:.2g}" if found.diverged else f"the last rate was {found.rates[-1]:.2g}"
            say(f"Learning rate: {len(found.rates)} updates, {end}; suggestion {suggestion}", sys.stderr)
        return found

    def _try_out(self, args: FitArguments, callback: Callback, may_fail: bool = False) -> TrainOutput | OutOfMemory:
        """Train on a module that isn't placed, which it is given back as. The user's callbacks and loggers hear nothing
        of it, and nothing is written. Afterwards the Fit has its own arguments.

        Args:
            args: of the run that is tried.
            callback: hears it alone.
            may_fail: return that a rank is out of memory, instead of raising it.
        """
        own_args, own_callbacks, loggers, profiler = self.own_args, self.own_callbacks, self.loggers, self.profiler
        self.own_callbacks, self.loggers, self.profiler = [], Loggers((), self), None
        try:
            self.begin_afresh(args, callbacks=[callback])
            self._saver = checkpoint.Saver(self.strategy, self.args, self.callbacks, self.loggers.note_checkpoint)
            with Watch(self.strategy, self.args, self.state, self._saver) as self._watch:
                ended = attempt(self, lambda over: self.train_from(None), lambda: may_fail)
                if isinstance(ended, OutOfMemory):
                    self.take_apart()
                    self.strategy.begin_again()  # wakes the ranks that wait for this one
            return ended
        finally:
            self.take_apart()
            self._watch = self._saver = None
            self.own_callbacks, self.loggers, self.profiler = own_callbacks, loggers, profiler
            self.memory = MemoryByStage(self.strategy.device)
            self.state.reset()
            self.begin_afresh(own_args, self.make_module(self.own_trial, own_args.seed))
