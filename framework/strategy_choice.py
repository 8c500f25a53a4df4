"""StrategyChoice: a Fit whose strategy is chosen for it, and may be another one when its first run begins."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import checkpoint
from .arguments import FitArguments
from .measures.memory import MemoryByStage
from .printing import say
from .rate_finding import RateFinding
from .run import batch_size
from .run.attempts import OutOfMemory, Standing
from .state import TrainOutput

if TYPE_CHECKING:
    from .planning.choosing import Candidate, Choice


class StrategyChoice(RateFinding):
    """What a Fit does with ``strategy="auto"``: takes what was chosen, measures, falls to the next candidate, and goes
    on as a checkpoint did. See docs/plan.md.

    Attributes:
        choice: why it has its strategy; None where one was named.
        asked: the arguments as they were before anything was chosen of them.
    """

    choice: "Choice | None" = None
    asked: FitArguments

    def take_choice(self, choice: "Choice") -> None:
        """Have the strategy, and the arguments, that a choice comes to; the module isn't placed. Collective.

        Args:
            choice: of the same candidates as the one before.

        Raises:
            ValueError: the candidate can't work with the module, the data or the precision.
        """
        from .planning.candidates import arguments_of, strategy_of

        chosen, precision = choice.chosen, self.strategy.precision
        assert chosen is not None and self.choice is not None and not self.placed
        changes = arguments_of(chosen, self.asked, before=self.choice.chosen)
        strategy = strategy_of(chosen)
        strategy.check_precision(precision)
        strategy.set_up(precision)
        self.strategy, self.choice = strategy, choice
        self.memory = MemoryByStage(strategy.device)
        self.own_args = self.own_args.replace(**changes)
        self.written = self.written.under(strategy)
        for follower in (self._saver, self._watch):
            if follower is not None:
                follower.follow(strategy)
        self.plan = self.plan.with_changes(changes)
        self._check_together(self.args, self.module, precision)
        self._interpret_module()
        self.follow(self.plan)

    def _way_to_train(self, path: Path | None) -> Callable[[Path | None], TrainOutput]:
        """Take a checkpoint's choice, where there is one, and return what trains from there. It isn't called in here,
        where it would be a frame more above each error in forward.
        """
        if self.choice is not None and path is not None:
            self._go_on_as(path)
        if self.args.auto_find_batch_size:
            return partial(batch_size.train, self)
        if self.choice is not None and not self.placed:
            from .planning import falling  # who names a strategy plans nothing

            return partial(falling.train, self)
        return self.train_from

    def _go_on_as(self, path: Path) -> None:
        """Take the choice of a checkpoint, where its plans were the same; else say what has changed."""
        from .planning.resumed import choice_to_go_on_with

        assert self.choice is not None
        choice, said = choice_to_go_on_with(checkpoint.read_state(path), self.choice)
        if choice.chosen != self.choice.chosen and not self.placed:
            self.take_choice(choice)
        if said and self.strategy.is_main:
            say(f"Resuming from {path}: {said}", sys.stderr)

    def _measure(self, count: int) -> None:
        """Have some candidates make a few updates each, and take the fastest; all else is as before. Collective.

        Args:
            count: of candidates, the first ones that fit; 0 measures none.

        Raises:
            ValueError: all of them are out of memory.
            TypeError: the module can't be copied.
        """
        choice = self.choice
        if not count or choice is None or len(choice.kept) < 2:
            return
        from .planning.automatic import show

        standing, seconds = Standing(self.strategy, self.run.stream), dict[str, float]()
        while (candidate := next_to_measure(choice, seconds, count)) is not None:
            if candidate != choice.chosen or choice is not self.choice:
                self.take_choice(choice.led_by(candidate))
            try:
                taken = self._time_updates()
            except ValueError as error:
                if not choice.is_bound(candidate):
                    raise
                choice = choice.led_by(candidate).after_refusal(" ".join(str(error).split()))
                continue
            finally:
                standing.restore(self.strategy)
            if taken is None:
                choice = choice.led_by(candidate).after_failure(proven=seconds)
            else:
                seconds[candidate.title] = taken
        if not seconds:
            raise ValueError(
                "strategy='auto': every candidate that fits by its plan was out of memory when it was measured. Take "
                "more ranks, a smaller per_device_train_batch_size with more gradient_accumulation_steps, or another "
                "precision."
            )
        choice = choice.measured(seconds)
        self.take_choice(choice)
        self.source.drop_copy()
        if self.strategy.is_main and self.args.progress:
            show(choice, self.strategy.world_size)

    def _time_updates(self) -> float | None:
        """Make a few updates; return the seconds of one on the slowest rank, or None where one is out of memory."""
        from .planning.timing import UPDATES, UpdateTimes
        from .search.learning_rates import sweep_arguments

        if self.source.module_init is None:
            self.source.keep_copy()
        times = UpdateTimes()
        arguments = sweep_arguments(self.own_args, UPDATES).replace(logging_strategy="no")
        ended = self._try_out(arguments, times, may_fail=True)
        if isinstance(ended, OutOfMemory):
            return None
        return max(self.strategy.gather(times.seconds))


def next_to_measure(choice: "Choice", measured: dict[str, float], count: int) -> "Candidate | None":
    """The next candidate that fits and wasn't measured, as long as there are fewer than ``count``; else None."""
    left = [each for each in choice.kept if each.title not in measured]
    return left[0] if left and len(measured) < count else None
