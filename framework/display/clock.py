"""The pace of a run, and when it will be over, whatever the first update or an evaluation took."""

import math
from collections import deque

from ..arguments import FitArguments
from ..state import TrainState

WINDOWS = 20  # stretches of updates between two pauses that the pace is the mean of, the newest


class Clock:
    """Measures stretches of updates without what lies between them: it is stopped where an evaluation or a save may
    come, and started where the next update begins. The first update, which compiles and fills caches, isn't measured.

    Args:
        now: when training began or was resumed. All times are in seconds, of ``time.monotonic``.

    Attributes:
        began: the same.

    Example:
        >>> clock = Clock(0.0)
        >>> clock.start(60.0, step=1)  # the first update took a minute
        >>> clock.stop(64.0, step=3)
        >>> clock.seconds_per_update(64.0, step=3)
        2.0
    """

    def __init__(self, now: float) -> None:
        self.began = now
        self.windows: deque[tuple[int, float]] = deque(maxlen=WINDOWS)  # (updates, seconds)
        self.since: float | None = None  # when the stretch under way began; None while the clock is stopped
        self.first = 0  # the updates that were done when it began
        self.stopped: float | None = None  # when the last stretch ended
        self.updates = 0  # measured ones, since the beginning
        self.evaluations, self.evaluating = 0, 0.0  # pauses with an evaluation, and their seconds
        self.pausing = 0.0  # seconds of all other pauses

    @property
    def is_running(self) -> bool:
        """Whether a stretch of updates is under way."""
        return self.since is not None

    def start(self, now: float, step: int, evaluated: bool = False) -> None:
        """Begin a stretch of updates.

        Args:
            now: when the next update begins.
            step: updates done.
            evaluated: whether there was an evaluation since the clock was stopped.
        """
        if self.stopped is not None:
            if evaluated:
                self.evaluations += 1
                self.evaluating += now - self.stopped
            else:
                self.pausing += now - self.stopped
        self.since, self.first, self.stopped = now, step, None

    def stop(self, now: float, step: int) -> None:
        """End the stretch that is under way, after so many updates of the run."""
        if self.since is not None:
            self.windows.append((step - self.first, now - self.since))
            self.updates += step - self.first
            self.since, self.stopped = None, now

    def seconds_per_update(self, now: float, step: int) -> float | None:
        """The mean over the newest stretches, the one that is under way included; None before the second update."""
        stretches = list(self.windows)
        if self.since is not None:
            stretches.append((step - self.first, now - self.since))
        updates = sum(each for each, _ in stretches)
        return sum(seconds for _, seconds in stretches) / updates if updates else None

    def last_seconds_per_update(self) -> float | None:
        """The mean over the last stretch that has ended; None where there was none."""
        updates, seconds = self.windows[-1] if self.windows else (0, 0.0)
        return seconds / updates if updates else None

    def seconds_left(self, now: float, state: TrainState, args: FitArguments) -> float | None:
        """What is left of the run: its updates, evaluations and pauses, as long as they were so far; None before the
        second update.
        """
        pace = self.seconds_per_update(now, state.global_step)
        if pace is None:
            return None
        left = max(0, state.max_steps - state.global_step)
        pauses = self.pausing / self.updates if self.updates else 0.0
        evaluation = self.evaluating / self.evaluations if self.evaluations else 0.0
        return left * (pace + pauses) + evaluations_left(state, args) * evaluation


def evaluations_left(state: TrainState, args: FitArguments) -> int:
    """The evaluations that a run will still make, where nothing else asks for one."""
    done, whole = state.global_step, state.max_steps
    if args.eval_strategy == "steps":
        every, first = int(args.eval_every or 1), max(done + 1, math.ceil(args.eval_delay))
        at_the_end = whole % every != 0
        return whole // every - (first - 1) // every + at_the_end if first <= whole else 0
    if args.eval_strategy == "epoch" and whole:
        return max(0, round(state.epoch * whole / done) - int(state.epoch)) if done else 0
    return 0
