"""What a rank's watch knows of the other ranks: a thread that reads their store, which may stop answering."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ...strategies.base import Strategy
from ...strategies.failures import Failure, Failures
from ...strategies.statuses import ANOTHER_FAILED
from ..printing import say
from . import failing, hang_report
from .ending import end_process
from .endings import AnotherRankFailed
from .roll import Roll
from .whereabouts import Whereabouts

LOOK = 1.0  # seconds between two looks
UNTIL_FORCED = 4.0  # seconds that the main thread has to fail by another rank's failure
UNANSWERED = 8.0  # seconds after which the store, or the process that holds it, is taken for stopped


class Others:
    """Looks once a second whether another rank has failed or calls the roll.

    Args:
        strategy: set up.
        host: the name of this rank's machine.
        where: tells where this rank is.
        act: called when all that answered the roll have told where they are: (certain, where this rank is), certain
            where some rank did not answer.
    """

    def __init__(
        self,
        strategy: Strategy,
        host: str,
        where: Callable[[], Whereabouts],
        act: Callable[[bool, Whereabouts], None],
    ) -> None:
        stores = strategy.open_stores("watch")
        assert stores is not None, "one rank alone has no others"
        self.rank, self.world_size, self.where, self.act = strategy.rank, strategy.world_size, where, act
        self.failures = Failures(*stores)
        self.roll = Roll(stores[0], strategy.rank, strategy.world_size, host)
        self.failed_at = 0.0
        self.asked_at = 0.0  # when the roll was asked for that isn't answered yet
        self._is_over = False
        self._wake = threading.Event()
        self._connection = threading.Lock()  # the main thread takes it over when its run fails
        self._thread = threading.Thread(target=self._look_after, name="stratagem watch of others", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, unless it waits for a store that doesn't answer: then it is left to itself."""
        self._is_over = True
        self._wake.set()
        self._thread.join(timeout=UNANSWERED if self._connection.locked() else None)

    def call_roll(self) -> None:
        """Have all ranks say where they are. Doesn't wait for them."""
        if not self.asked_at:
            self.asked_at = time.monotonic()
            self._wake.set()

    def is_silent(self) -> bool:
        """Whether the roll that was called came to nothing, for the store doesn't answer."""
        return bool(self.asked_at) and time.monotonic() > self.asked_at + UNANSWERED

    def tell(self, failure: Failure) -> None:
        """Tell a failure of this rank, where the store answers."""
        if self._connection.acquire(timeout=1.0):
            with suppress(RuntimeError):
                self.failures.tell(failure)
            self._connection.release()

    def settle(self, error: BaseException) -> None:
        """Tell the others what ends this rank; see ``failing.settle``.

        Raises:
            AnotherRankFailed: in place of an error that is another rank's doing.
        """
        self._is_over = True  # the thread must not end this process meanwhile
        if not self._connection.acquire(timeout=UNANSWERED):
            self._raise_lost(error)
        try:
            if not self.failures.is_reachable():
                self._raise_lost(error)
            failing.settle(error, self.failures, self.roll, self.where)
        except AnotherRankFailed:
            raise
        except RuntimeError:
            self._raise_lost(error)
        finally:
            self._connection.release()

    def _raise_lost(self, error: BaseException) -> None:
        """Blame the process that holds the store, where the error says no more than that a connection is gone."""
        if failing.is_about_connection(error):
            lost = self.failures.holder()
            say(f"Failed first: {lost}.", sys.stderr)
            raise AnotherRankFailed(lost) from None

    # The thread.

    def _look_after(self) -> None:
        while not self._is_over:
            self._wake.wait(LOOK)
            self._wake.clear()
            try:
                with self._connection:
                    if not self._is_over:
                        self._look()
            except RuntimeError:  # the store is gone with the process that holds it
                return

    def _look(self) -> None:
        failure = self.failures.first()
        if failure is not None and failure.rank != self.rank:
            self.failed_at = self.failed_at or time.monotonic()
            if time.monotonic() > self.failed_at + UNTIL_FORCED:
                end_process(ANOTHER_FAILED, f"rank {self.rank} ends; failed first: {failure}.")
            return
        if self.asked_at:
            self.roll.call()
        if self.roll.is_called():
            self._answer()
        self.asked_at = 0.0

    def _answer(self) -> None:
        """Answer a roll call. The first rank to have all answers says what they come to."""
        where = self.where()
        reports = self.roll.answer(where)
        everyone = len(reports) == self.world_size
        moves = max(report.seconds for report in reports.values()) < hang_report.QUIET
        if self.failures.first() is not None or (everyone and moves):
            return  # whoever called has lost a connection, or was late
        if self.roll.speaks():
            said = hang_report.sentence(reports, self.roll.hosts())
            idle = max(report.seconds for report in reports.values())
            say(f"No update for {idle:.0f} s. {said[0].upper()}{said[1:]}", sys.stderr)
        self.roll.part(reports)
        self.act(not everyone, where)
