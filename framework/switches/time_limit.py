"""max_time: ends training, evaluated and saved, before its time is over."""

import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import FitArguments
from ..callbacks import Callback
from ..fields import cadence
from ..fields.accumulation import micro_batches_at
from ..fields.durations import as_clock
from ..state import Control, TrainState

UPDATES = 32  # the latest, of which the longest tells how long the next one may take
UNMEASURED = 0.1, 120.0  # the part of the limit, and the most seconds, kept for what was never measured
END = 0.01, 10.0  # the same, kept for what follows the last save


class TimeLimit(Callback):
    """Ends training while there is still time for an evaluation and a checkpoint.

    The main process decides at the end of each update, by the longest of the latest updates, of evaluations and of
    saves. With several ranks, what it asks for travels with the next update's message and is obeyed at that one's end,
    so that it decides an update earlier. The last log, evaluation and checkpoint are asked for when the epoch is left.

    Args:
        limit: seconds from the beginning of ``train``, over all parts of a run that is resumed.

    Attributes:
        used: seconds that the earlier parts took; all of them where the last one ended for want of time.
        is_over: whether this object has ended training.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.used = 0.0
        self.is_over = False
        self.began: float | None = None  # when train did
        self.since = 0.0  # when what is measured next began
        self.updates: deque[float] = deque(maxlen=UPDATES)
        self.evaluation = self.save = min(UNMEASURED[0] * limit, UNMEASURED[1])
        self.has_evaluated = self.has_saved = False
        self.evaluated_at = self.saved_at = -1
        self.save_began = 0.0

    # What is measured.

    def on_train_begin(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Start the clock, and leave at once a run whose time was used up."""
        if state.global_step == 0:
            self.used = 0.0
        self.began, self.since, self.is_over = fit.run.watch.began, time.monotonic(), False
        self.updates.clear()
        self.evaluated_at = self.saved_at = -1
        # All ranks have read the same checkpoint.
        if self.used >= self.limit and not control.should_training_stop:
            control.stop_training(f"max_time={args.max_time!r} was used up before; raise it to go on")

    def on_evaluate(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Note how long an evaluation took."""
        taken, self.evaluated_at = self.lap(), state.global_step
        self.evaluation = max(taken, self.evaluation if self.has_evaluated else 0.0)
        self.has_evaluated = True

    def on_save(self, args: FitArguments, state: TrainState, control: Control, **context: Any) -> None:
        """Note how long training waited for a checkpoint."""
        taken = self.lap()
        self.save_began, self.saved_at = self.since - taken, state.global_step
        self.note_save(taken)

    def checkpoint_published(self, path: Path) -> None:
        """Note how long a checkpoint took that was written in the background."""
        if self.saved_at >= 0 and path.name == f"checkpoint-{self.saved_at}":
            self.note_save(time.monotonic() - self.save_began)

    def note_save(self, seconds: float) -> None:
        """Keep the longest time that a save took."""
        self.save = max(seconds, self.save if self.has_saved else 0.0)
        self.has_saved = True

    def lap(self) -> float:
        """The seconds since this was called last."""
        since, self.since = self.since, time.monotonic()
        return self.since - since

    def seconds(self) -> float:
        """The seconds used so far."""
        return self.used if self.began is None else self.used + time.monotonic() - self.began

    # What is decided.

    def on_step_end(self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any) -> None:
        """Stop training where the next update might come too late."""
        self.updates.append(self.lap())
        if len(self.updates) == 2 and state.global_step > 1 and self.updates[0] > self.updates[1]:
            self.updates.popleft()  # the first one compiles, and starts what loads data
        if not fit.strategy.is_main or control.should_training_stop:
            return
        needed = max(self.updates)
        if fit.strategy.world_size > 1:
            following = Control()
            cadence.after_update(args, replace(state, global_step=state.global_step + 1), following)
            if following.should_training_stop:
                return  # no wish would be obeyed earlier
            needed += max(self.updates) + self.due(following)
        self.decide(args, control, needed)

    def on_epoch_end(
        self, args: FitArguments, state: TrainState, control: Control, *, fit: Any, **context: Any
    ) -> None:
        """Stop training where the next epoch's first update might come too late; ask for what is due at the end."""
        if not fit.strategy.is_main:
            return
        if not control.should_training_stop and self.updates:
            updates = 1 if fit.strategy.world_size == 1 else 2
            following, before = (micro_batches_at(vars(args), fit.run.epoch_index - ago) for ago in (0, 1))
            self.decide(args, control, updates * max(self.updates) * max(1.0, following / before))
        if self.is_over:
            evaluates = args.eval_strategy == "steps" and state.global_step >= args.eval_delay
            control.should_log |= args.logging_strategy == "steps"
            control.should_evaluate |= evaluates and self.evaluated_at < state.global_step
            control.should_save |= args.save_strategy != "no" and self.saved_at < state.global_step

    def decide(self, args: FitArguments, control: Control, needed: float) -> None:
        """Stop training where there isn't time for what is due now, some seconds more, and the end.

        Args:
            args: of the run.
            control: its flags say what is due now.
            needed: seconds until the next decision is obeyed.
        """
        ending = Control(should_evaluate=args.eval_strategy != "no", should_save=args.save_strategy != "no")
        needed += self.due(control) + self.due(ending) + min(END[0] * self.limit, END[1])
        if args.load_best_model_at_end:
            needed += self.save
        used = self.seconds()
        if used + needed > self.limit:
            self.is_over = True
            control.stop_training(f"max_time={args.max_time!r} is nearly over: {as_clock(used)} used")

    def due(self, control: Control) -> float:
        """The seconds that flags ask for."""
        return self.evaluation * control.should_evaluate + self.save * control.should_save

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds used. What is left where training ended for want of time counts as used, too."""
        used = self.seconds()
        return {"seconds": max(used, self.limit) if self.is_over else used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a saved state.

        Raises:
            ValueError: it holds no duration.
        """
        if not 0.0 <= state["seconds"] < float("inf"):
            raise ValueError(f"seconds is {state['seconds']!r}: it is a duration")
        self.used, self.began, self.is_over = state["seconds"], None, False
