"""The supervisor of ranks on one machine: starts them, passes signals on, ends all where one fails, and starts again.

It sleeps until a rank ends, a signal comes, or a time that it has set is over. Each rank leads a session of its own, so
that Ctrl-C in a terminal reaches the supervisor alone, which passes it on: no rank is told twice. When a rank has
failed, what it had started (workers that load data) is ended with it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from .failures import Failure, tell_dead, told
from .statuses import ANOTHER_FAILED, ENDED_BY_SIGNAL, HUNG, INTERRUPTED, PREEMPTED

LAUNCHER = "STRATAGEM_LAUNCHER"  # environment variable: the process that started this rank
ELASTIC = "STRATAGEM_ELASTIC"  # environment variable: the range of ranks that was asked for, "1:2"
LOCALHOST = "127.0.0.1"
PATIENCE = 6.0  # seconds that ranks have to end by themselves after one has failed: more than a rank's own watch takes
BETWEEN = 2.0  # seconds from SIGTERM, or a second signal, to SIGKILL
AFTER_THE_FIRST = 30.0  # seconds that ranks have once the first of them has ended by a signal
TOGETHER = 2.0  # seconds within which signals count as one: a scheduler and a script both send theirs
SWEEPING = 1.0  # seconds that what a rank had started has to end by itself
SPOKEN_FOR = (ANOTHER_FAILED, HUNG)  # statuses of which the screen has the reason
WHY = {
    "SIGKILL": " (out of memory? see dmesg)",
    "SIGSEGV": " (a crash outside of Python)",
    "SIGBUS": " (is /dev/shm full?)",
}


@dataclass(frozen=True)
class Launch:
    """What the supervisor starts.

    Attributes:
        command: of each rank.
        fewest, most: ranks; as many as ``most``, unless some were lost.
        max_restarts: how often the ranks are started again after one has failed.
        signals: that are passed on to the ranks.
        sent: what each rank reads from its standard input; None leaves it this process's.
        inherited: file descriptors that the ranks have, too.
    """

    command: Sequence[str]
    fewest: int
    most: int
    max_restarts: int = 0
    signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)
    sent: bytes | None = None
    inherited: tuple[int, ...] = ()

    def environments(
        self, size: int, lost: Sequence[int], attempt: int, port: int, run_id: str
    ) -> list[dict[str, str]]:
        """Return the variables by which each rank of an attempt knows its place: those of torchrun.

        Args:
            size: ranks in this attempt.
            lost: local ranks of the attempt before, whose devices this one goes without.
            attempt: its number, from 0.
            port: of the store.
            run_id: of all attempts.
        """
        common = {
            **os.environ,
            "LOCAL_WORLD_SIZE": str(size),
            "WORLD_SIZE": str(size),
            "ROLE_WORLD_SIZE": str(size),
            "ROLE_NAME": "default",
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": LOCALHOST,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            LAUNCHER: str(os.getpid()),
        }
        if self.fewest < self.most:
            common[ELASTIC] = f"{self.fewest}:{self.most}"
        if lost and torch.cuda.is_available():
            common["CUDA_VISIBLE_DEVICES"] = devices_without(lost, os.environ, torch.cuda.device_count())
        return [{**common, "RANK": r, "LOCAL_RANK": r, "ROLE_RANK": r} for r in map(str, range(size))]


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
        status: for the supervisor to end with.
        is_final: whether the work is done, or a signal has asked for the end.
        lost: local ranks that a signal has killed which wasn't the supervisor's.
        what: which rank failed first; empty where none did.
    """

    status: int
    is_final: bool = True
    lost: tuple[int, ...] = ()
    what: str = ""


@dataclass(frozen=True)
class Signalled:
    """The supervisor received a signal."""

    number: int


@dataclass(frozen=True)
class Ended:
    """A rank's process has ended."""

    rank: int


Events = SimpleQueue[Signalled | Ended]


def supervise(launch: Launch) -> int:
    """Run a command on ranks of this machine, again where one fails, until its end.

    Returns:
        The status to end with: 0, that of ranks that a signal has ended (143, 130), or that of the rank that failed
        first; 128 and the signal's number where it was killed.
    """
    store = dist.TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
    run_id, lost = uuid.uuid4().hex, tuple[int, ...]()
    with signals_as_events(launch.signals) as events:
        for attempt in range(launch.max_restarts + 1):
            size = max(launch.fewest, launch.most - len(lost))
            environments = launch.environments(size, lost[: launch.most - size], attempt, store.port, run_id)
            here = dist.PrefixStore(f"attempt{attempt}", store)
            end = Attempt(launch.command, environments, here, events, launch.sent, launch.inherited).run()
            if end.what:
                say(end.what)
            if end.is_final:
                break
            # What was lost may be there again: the attempt right after a loss goes without, the next one with all.
            lost = end.lost if size == launch.most else ()
            if attempt < launch.max_restarts:
                ranks = max(launch.fewest, launch.most - len(lost))
                of = f"restart {attempt + 1} of {launch.max_restarts}"
                say(f"Starting again on {ranks} rank{'s' * (ranks > 1)} ({of}).")
    return end.status


class Attempt:
    """Ranks from their start to the end of the last of them.

    Args:
        command: of each rank.
        environments: of the ranks, in their order.
        store: of the attempt, by which the ranks meet.
        events: what the supervisor sleeps on.
        sent, inherited: see Launch.
    """

    def __init__(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], store: dist.Store, events: Events,
        sent: bytes | None = None, inherited: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.sent = sent
        self.pipes: dict[str, Any] = {"stdin": None if sent is None else subprocess.PIPE, "pass_fds": inherited}
        self.command, self.environments, self.store, self.events = command, environments, store, events
        self.host = socket.gethostname()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: dict[int, int] = {}  # of ranks that have ended
        self.failed: int | None = None  # the first rank that was seen to fail
        self.lost: list[int] = []
        self.signals: list[int] = []  # that were passed on
        self.signalled_at = 0.0
        self.is_ending = False  # the supervisor has told ranks to end
        self.plan: list[tuple[float, Callable[[], None]]] = []  # what is done at which time, unless all have ended

    def run(self) -> End:
        """Start the ranks, and return when all have ended."""
        try:
            for rank, environment in enumerate(self.environments):
                self.processes[rank] = process = subprocess.Popen(
                    self.command, env=environment, start_new_session=True, **self.pipes
                )
                threading.Thread(target=self._await, args=(rank, process), daemon=True).start()
            while len(self.codes) < len(self.processes):
                self._take(self._next())
        finally:
            self._kill()
            self._sweep()
        return self._end()

    def _await(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        if self.sent is not None and process.stdin is not None:
            with contextlib.suppress(OSError), process.stdin as pipe:  # the rank may end before it has read all
                pipe.write(self.sent)
        process.wait()
        self.events.put(Ended(rank))

    def _next(self) -> Signalled | Ended | None:
        """Sleep until the next event; None where the time of the plan's next step has come."""
        try:
            return self.events.get(timeout=max(0.0, self.plan[0][0] - time.monotonic()) if self.plan else None)
        except Empty:
            return None

    def _take(self, event: Signalled | Ended | None) -> None:
        if event is None:
            _, step = self.plan.pop(0)
            step()
        elif isinstance(event, Signalled):
            self._take_signal(event.number)
        else:
            self._take_end(event.rank, self.processes[event.rank].returncode)

    def _take_signal(self, number: int) -> None:
        now = time.monotonic()
        if self.signals and now < self.signalled_at + TOGETHER:
            return
        is_second = bool(self.signals)
        self.signals.append(number)
        self.signalled_at = now
        self._send(number)
        if is_second or self.failed is not None:
            self.is_ending = True
            self.plan = [(now + BETWEEN, self._kill)]

    def _take_end(self, rank: int, code: int) -> None:
        self.codes[rank] = code
        by_signal = code in ENDED_BY_SIGNAL or -code in self.signals
        if code == 0 or (self.is_ending and code in (-signal.SIGTERM, -signal.SIGKILL)):
            return
        if code < 0 and not by_signal:
            self.lost.append(rank)
        if by_signal:
            if not self.plan:
                self._end_others(AFTER_THE_FIRST)
        elif self.failed is None:
            self.failed = rank
            self._tell(rank, code)
            self._end_others(PATIENCE)

    def _tell(self, rank: int, code: int) -> None:
        """Say why a rank has failed that could not say so itself, in the store and on the screen."""
        if code in SPOKEN_FOR:
            return
        if code < 0:
            what = f"was killed by {name_of(-code)}{WHY.get(name_of(-code), '')}"
        else:
            failure = told(self.store)
            if failure is not None and failure.rank == rank:
                return
            what = f"ended with status {code}"
        tell_dead(self.store, Failure(rank, self.host, what))
        say(f"Rank {rank} (host {self.host}) {what}.")

    # Ending ranks.

    def _end_others(self, seconds: float) -> None:
        """Plan to end what hasn't ended by itself after so many seconds."""
        then = time.monotonic() + seconds
        self.plan = [(then, self._terminate), (then + BETWEEN, self._kill)]

    def _terminate(self) -> None:
        self.is_ending = True
        for rank in self._running():
            stopped = is_stopped(self.processes[rank].pid)
            self.processes[rank].send_signal(signal.SIGKILL if stopped else signal.SIGTERM)

    def _kill(self) -> None:
        self.is_ending = True
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for rank in self._running():
            self.processes[rank].send_signal(number)

    def _running(self) -> list[int]:
        return [rank for rank in self.processes if rank not in self.codes]

    def _sweep(self) -> None:
        """End what failed ranks had started: first by SIGTERM, which a process that cleans up after them ignores."""
        groups = [self.processes[rank].pid for rank in self.processes if self.codes.get(rank) != 0]
        left = [group for group in groups if send_to_group(group, signal.SIGTERM)]
        deadline = time.monotonic() + SWEEPING
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = [group for group in left if send_to_group(group, 0)]
        for group in left:
            send_to_group(group, signal.SIGKILL)

    # What the end was.

    def _end(self) -> End:
        codes = self.codes.values()
        asked = next((status for status in (PREEMPTED, INTERRUPTED) if status in codes), None)
        if asked is None and self.signals and any(codes):
            asked = INTERRUPTED if self.signals[0] == signal.SIGINT else PREEMPTED
        if self.failed is None:
            return End(asked or 0)
        failed, code = self._first()
        status = code if code > 0 else 128 - code
        if asked is not None and status == ANOTHER_FAILED:  # whoever failed first was ended by the signal, unsaved
            status = asked
        others = "; the others were ended" if len(self.processes) > 1 else ""
        what = f"Rank {failed} failed first, with exit code {code}{others}."
        return End(status, asked is not None, tuple(self.lost), what)

    def _first(self) -> tuple[int, int]:
        """The rank that failed first and its exit code: as ranks have told, or as it was seen."""
        assert self.failed is not None
        code = self.codes[self.failed]
        failure = told(self.store)
        if code == ANOTHER_FAILED and failure is not None and self.codes.get(failure.rank, 0) not in SPOKEN_FOR:
            its_code = self.codes[failure.rank]
            return failure.rank, 1 if its_code <= 0 else its_code  # ended by the supervisor where it could not end
        return self.failed, code


@contextlib.contextmanager
def signals_as_events(signals: Sequence[int]) -> Iterator[Events]:
    """In here, signals to this process are events, and do nothing else. Those that it was started to ignore stay
    ignored, and outside of the main thread they all stay what they were.
    """
    events: Events = SimpleQueue()

    def note(number: int, frame: object) -> None:
        events.put(Signalled(number))

    def note_hangup(number: int, frame: object) -> None:
        events.put(Signalled(signal.SIGTERM))  # ranks have no terminal, and no handler for its loss

    is_main = threading.current_thread() is threading.main_thread()
    caught = dict.fromkeys(signals, note) | {signal.SIGHUP: note_hangup}
    before = {number: signal.getsignal(number) for number in caught} if is_main else {}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, caught[number])
    try:
        yield events
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def devices_without(lost: Sequence[int], environment: Mapping[str, str], count: int) -> str:
    """Return CUDA_VISIBLE_DEVICES without the devices of some local ranks.

    Example:
        >>> devices_without([1], {"CUDA_VISIBLE_DEVICES": "4,5,6"}, 3), devices_without([0], {}, 2)
        ('4,6', '1')
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return ",".join(device for rank, device in enumerate(visible.split(",")) if rank not in lost)


def send_to_group(group: int, number: int) -> bool:
    """Send a signal to a group of processes; return whether there are any."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # there is none, or on macOS only one that nobody has waited for
        return False
    return True


def is_stopped(process: int) -> bool:
    """Return whether a process was stopped, by SIGSTOP or a debugger; False where the system doesn't tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def name_of(number: int) -> str:
    """Return the name of a signal; its number where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def say(text: str) -> None:
    """Print a line to stderr, unless nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
