"""Rounds: updates of a module that is trained in turns, each on the batches that its turns ask for."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .objective import Count
from .run.run import Run
from .steps import Steps
from .turn_objective import TurnObjective
from .turns import Turn, Turns


class Rounds:
    """Makes updates in turns.

    A batch of a round is what an update of another module has: ``gradient_accumulation_steps`` micro-batches over all
    ranks, whose items a turn's loss is one mean over. The order of everything in a round::

        for each batch:
            get_batch_samples            the first one's before on_step_begin
            for each turn that is due:   on each batch, or on each ``every``-th
                for each micro-batch:
                    loss, weight, backward
                    on_substep_end       (not after the last)
                prepare gradients, clip
                on_pre_optimizer_step
                optimizer step
                on_optimizer_step
                zero gradients
        turns that were never due        on the last batch, where the data ended early
        schedules                        of turns of which one step at least was made

    Args:
        steps: the verbs.
        run: begun.
        turns: of the module.
    """

    def __init__(self, steps: Steps, run: Run, turns: Turns) -> None:
        self.steps, self.run, self.turns = steps, run, turns
        assert run.placement is not None
        rows = steps.objective.rows
        self.objectives = {
            turn.name: TurnObjective(run.module, turn, run.placement.moved[turn.name], rows) for turn in turns
        }
        self.parameters = {turn.name: run.strategy.parameters_in_turn(turn.name) for turn in turns}
        self.waiting = run.pace if run.strategy.forward_waits else None

    def update(
        self, micro_batches: list[Any], num_items: Count | None, batches: Iterator[Any], micro_batches_per_batch: int
    ) -> bool:
        """Make a round, and end it.

        Args:
            micro_batches, num_items: of its first batch, see ``Steps.get_batch_samples``.
            batches: over this rank's micro-batches.
            micro_batches_per_batch: of the other batches, at most.

        Returns:
            True: it was made, but for turns that were left out.

        Raises:
            SkippedUpdatesError: a turn was left out too often in a row; on every rank.
        """
        run, steps = self.run, self.steps
        late = {turn.name: turn for turn in self.turns}
        for number in range(1, self.turns.batches + 1):
            is_first = True
            for turn in self.turns:
                if number % turn.every == 0:
                    self._make(turn, micro_batches, num_items, is_first)
                    late.pop(turn.name, None)
                    is_first = False
            if number == self.turns.batches:
                break
            begins_at, items = run.begins_at, run.averages.begin_batch()
            following, count = steps.get_batch_samples(batches, micro_batches_per_batch, run.strategy.device)
            if not following:
                run.begin_update(begins_at)
                if items is not None:
                    run.averages.expect(items)
                break
            micro_batches, num_items = following, count
        for turn in late.values():
            self._make(turn, micro_batches, num_items, is_first=False)
        run.end_round()
        return True

    def _make(self, turn: Turn, micro_batches: Sequence[Any], num_items: Count | None, is_first: bool) -> None:
        """Make a turn on a batch; ``is_first``: no other turn was made on it before."""
        run, steps, strategy = self.run, self.steps, self.run.strategy
        objective, parameters = self.objectives[turn.name], self.parameters[turn.name]
        stepping = run.steppings[turn.name]
        run.begin_turn()
        with strategy.turn(turn.name):
            turn_loss: Tensor | None = None
            for index, inputs in enumerate(micro_batches, start=1):
                last = index == len(micro_batches)
                if self.waiting is not None:
                    self.waiting.begin_forward()
                with strategy.accumulate(last):
                    loss = steps.turn_step(objective, inputs, num_items, is_first)
                turn_loss = loss if turn_loss is None else turn_loss + loss
                if not last:
                    self.tell("on_substep_end")
            assert turn_loss is not None
            if not objective.reaches:
                objective.check_reached(parameters)
            stepping.clip(parameters)
            self.tell("on_pre_optimizer_step", turn=turn.name)
            stepping.step(turn_loss)
            self.tell("on_optimizer_step", turn=turn.name)
            stepping.settle_known_schedule()
            for parameter in parameters:
                parameter.grad = None
            strategy.flush()
            if stepping.schedule_is_due:
                stepping.note_attempt()
        run.averages.end_turn(turn.name, turn_loss)

    def tell(self, event: str, **about: Any) -> None:
        """Tell callbacks of an event in the midst of a round."""
        self.steps.emit(event, **about)
