"""The watch over one rank of a run: a thread that sees signals, failures of other ranks and hangs, and acts on them.

The main thread may wait in a collective for a rank that will never come. So the watch's thread does what has to be done
meanwhile. It wakes once a second, and at a signal. What it does, in this order::

    a first signal          note the wish to end, which the update's message carries to all ranks
    a second one, or the end of preemption_grace    end this process
    no progress for long    call the roll; the first rank alive says who waits for whom; end this process

A second thread looks at the other ranks (``others.py``), for their store may stop answering.
"""

import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...strategies.base import Strategy
from ...strategies.failures import Failure
from ...strategies.statuses import HUNG, INTERRUPTED, PREEMPTED
from ..arguments import FitArguments
from ..fields.argument_ranges import names_in
from ..printing import say
from ..state import TrainState
from . import hang_report, whereabouts
from .ending import end_process
from .endings import Interrupted
from .others import Others
from .pulse import Pulse
from .signals import Signals
from .whereabouts import Whereabouts

if TYPE_CHECKING:
    from ..checkpoint import Saver

LOOK = 1.0  # seconds between two looks
TOGETHER = 2.0  # seconds within which signals count as one: a launcher and a scheduler both send theirs
PATIENCE = 10.0  # times the limit, after which ranks that all answer are ended where no hang_timeout was given
MANY = 1 << 20  # more than there are ranks, so that two counts fit into the sum of one number


class WatchWarning(UserWarning):
    """What the watch sees coming, while nothing is lost yet."""


class Watch:
    """Looks after one rank while it trains; entered around a run.

    Args:
        strategy: set up.
        args: of the run: ``preemption_signals``, ``preemption_grace``, ``hang_timeout``, ``on_hang``.
        state: progress of the run.
        saver: knows how long a checkpoint takes.

    Attributes:
        wish: the status that a signal asks this rank to end with; 0 where none has come.
        batches: of evaluations, done so far.
        may_break: whether a signal may end the evaluation that is under way.
        problem: why the run can't go on as it is configured; None where it can.
        began: when ``train`` did, by the monotonic clock.
    """

    def __init__(self, strategy: Strategy, args: FitArguments, state: TrainState, saver: "Saver") -> None:
        self.strategy, self.args, self.state, self.saver = strategy, args, state, saver
        self.wish, self.batches, self.may_break = 0, 0, False
        self.problem: str | None = None
        self.began = 0.0
        self.host = socket.gethostname()
        self.signals = Signals(names_in(args.preemption_signals))
        self.pulse = Pulse(args.hang_timeout)
        self.others: Others | None = None
        self._thread = threading.Thread(target=self._look_after, name="stratagem watch", daemon=True)
        self._trains_in = 0  # the thread that this run is in
        self._stacks = ""  # of all threads, when this rank was last asked where it is
        self._is_leaving = self._is_over = self._has_warned = False
        self._signal = 0  # the first that came, at this time:
        self._signalled_at = self._reported_at = 0.0

    def __enter__(self) -> "Watch":
        self.began = time.monotonic()
        self._trains_in = threading.get_ident()
        self.signals.catch()
        self._thread.start()
        if self.strategy.world_size > 1:
            self.others = Others(self.strategy, self.host, self._where, self._act)
            self.others.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._is_leaving = True
        try:
            if error is not None and not isinstance(error, Interrupted) and self.others is not None:
                self.others.settle(error)
        finally:
            if self.others is not None:
                self.others.stop()
            self._is_over = True
            self.signals.wake()
            self._thread.join()
            self.signals.let_go()
        if self._signal and error is None and not self.signals.is_programs_own(self._signal):
            os.kill(os.getpid(), self._signal)  # it came after the last update that could have carried the wish

    # What the run asks and tells.

    def follow(self, strategy: Strategy) -> None:
        """Look after the rank under another strategy, over the same ranks."""
        self.strategy = strategy

    def begin_training(self) -> None:
        """Begin to measure updates: everything is placed and restored."""
        self.pulse.start(time.monotonic(), (self.state.global_step, self.batches))

    def words(self) -> int:
        """This rank's wish, for the sum over all ranks that ``told`` reads."""
        return 0 if not self.wish else 1 if self.wish == PREEMPTED else MANY

    @staticmethod
    def told(total: int) -> int:
        """The status that some rank wishes to end with; 0 where none does. SIGTERM goes before Ctrl-C."""
        return 0 if not total else PREEMPTED if total % MANY else INTERRUPTED

    def note_batch(self) -> None:
        """Note progress of an evaluation."""
        self.batches += 1

    @contextmanager
    def breaks_evaluations(self) -> Iterator[None]:
        """In here a signal ends evaluations: the loop's own, after which the run can be saved."""
        self.may_break = True
        try:
            yield
        finally:
            self.may_break = False

    # The thread.

    def _look_after(self) -> None:
        while not self._is_over:
            for number in self.signals.wait(LOOK):
                self._take_signal(number)
            if not (self._is_over or self._is_leaving):
                try:
                    self._look(time.monotonic())
                except Exception as error:  # a warning that a program has made an error; signals must be seen on
                    say(f"{type(error).__name__}: {error}", sys.stderr)

    def _look(self, now: float) -> None:
        self.pulse.look(now, (self.state.global_step, self.batches))
        if self._signal and now > self._signalled_at + self.args.preemption_grace:
            self._end_unsaved(f"no update and save were over within preemption_grace={self.args.preemption_grace}")
        self._look_for_hang(now)
        self._check_arguments()

    def _take_signal(self, number: int) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._signalled_at = number, now
            self.wish = INTERRUPTED if number == signal.SIGINT else PREEMPTED
            name = signal.Signals(number).name
            if self.strategy.is_main or self.strategy.world_size > 1:
                said = f"{name}: the run is saved after this update, and ends. A second signal ends it at once."
                say(f"rank {self.strategy.rank}: {said}" if self.strategy.world_size > 1 else said, sys.stderr)
        elif now > self._signalled_at + TOGETHER:
            self._end_unsaved(f"a second signal, {signal.Signals(number).name}, came")

    def _end_unsaved(self, why: str) -> None:
        update = self.state.global_step + 1
        failure = Failure(self.strategy.rank, self.host, f"ended by a signal in update {update}, unsaved: {why}")
        if self.others is not None:
            self.others.tell(failure)
        end_process(self.wish, f"{failure}.")

    def _check_arguments(self) -> None:
        """Say what measured times tell about the arguments."""
        if self.pulse.timeout_is_too_short() and self.problem is None:
            self.problem = (
                f"hang_timeout={self.args.hang_timeout} is below the {self.pulse.longest:.1f} s that an update takes: "
                "each would be taken for a hang. Raise it, or leave it out: the limit then follows the updates."
            )
        needed = self.pulse.longest + self.saver.seconds
        if needed > self.args.preemption_grace and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"preemption_grace={self.args.preemption_grace} s is less than an update ({self.pulse.longest:.1f} s) "
                f"and a checkpoint ({self.saver.seconds:.1f} s) take: a run that gets a signal may end unsaved. Raise "
                "it as far as the scheduler waits, save to a faster disk, or take async_save=True.",
                WatchWarning,
                stacklevel=2,
            )

    def _where(self) -> Whereabouts:
        seconds = self.pulse.without_progress(time.monotonic())
        frame = whereabouts.frame_of(self._trains_in)
        # By the time that a report is written, the first rank to end may have freed this one from where it waited.
        self._stacks = whereabouts.stacks()
        return whereabouts.find(frame, self.strategy.rank, self.state.global_step + 1, seconds)

    # Hangs.

    def _look_for_hang(self, now: float) -> None:
        idle = self.pulse.without_progress(now)
        if idle < hang_report.QUIET:
            return
        frame = whereabouts.frame_of(self._trains_in)
        if whereabouts.is_debugged(frame):
            self.pulse.rest(now)
            return
        limit = self.pulse.limit(whereabouts.is_long(frame))
        if self._reported_at and self._reported_at > self.pulse.moved_at:
            limit *= PATIENCE  # it was said once
        if idle <= limit:
            return
        if self.others is None or self.others.is_silent():
            self._report_alone()
        else:
            self.others.call_roll()

    def _report_alone(self) -> None:
        """Say where this rank is, which has no others, or none that could be asked."""
        where = self._where()
        said = f"No update for {where.seconds:.0f} s. "
        if self.others is None:
            said += hang_report.sentence({where.rank: where}, {where.rank: self.host})
        else:
            holder = self.others.failures.holder()
            said += (
                f"Rank 0 (host {holder.host}) doesn't answer, nor does the ranks' store, which it or the launcher "
                f"there holds: stopped, dead, or cut off{hang_report.waits_for([where], [0])}"
            )
        say(said, sys.stderr)
        self._act(self.others is not None, where)

    def _act(self, is_certain: bool, where: Whereabouts) -> None:
        """Do what follows from a report: write this rank's part of it, and end the run or not."""
        ends = self._ends(is_certain)
        self._write(where)
        if ends:
            end_process(HUNG)

    def _ends(self, is_certain: bool) -> bool:
        """Whether the run ends with this report. Without hang_timeout it ends where a rank doesn't answer, or where
        several ranks were reported before and still stand; one rank may compute as long as it likes.
        """
        was_said = self._reported_at > self.pulse.moved_at
        self._reported_at = time.monotonic()
        if self.args.on_hang != "end":
            return False
        several = self.strategy.world_size > 1
        return is_certain or self.args.hang_timeout is not None or (several and was_said)

    def _write(self, where: Whereabouts) -> None:
        try:
            path = hang_report.write_file(Path(self.args.output_dir), where, self._stacks)
        except OSError:
            say(self._stacks, sys.stderr)
            return
        if self.strategy.is_main:
            say(f"Where each rank stands, with the stacks of its threads: {path.parent}", sys.stderr)
