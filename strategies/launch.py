"""Starting ranks: the calling script again, once for each device, under a supervisor."""

import ctypes
import os
import re
import signal
import socket
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from .base import Strategy
from .environment import TORCHRUN, find_place, warn_of_missing_srun
from .supervisor import ELASTIC, LAUNCHER, Launch, say, supervise

UNNAMED = "none"  # what torchrun calls every run that it wasn't given a name for
RUN = "STRATAGEM_RUN"  # environment variable: the name of a run that others than a launcher start again
PR_SET_PDEATHSIG = 1  # an option of Linux's prctl


def start_ranks(
    strategy: Strategy, devices: int | str, max_restarts: int, signals: Iterable[str] = (), is_quiet: bool = True
) -> None:
    """Make sure that the ranks exist that the strategy is to run on.

    Returns where this process is such a rank (torchrun, srun, mpirun or a launch from here started it) or where one is
    enough. Otherwise the calling script is run again on every rank, and this process ends with their status.

    Args:
        strategy: says whether more than one rank is of use.
        devices: ranks on this machine; "auto" takes one for each accelerator (one where there is none); a range "1:2"
            goes without ranks that were killed, in the attempt after.
        max_restarts: how often all ranks are started again after one failed.
        signals: names of those that the launcher passes on to the ranks, beside SIGTERM and SIGINT.
        is_quiet: leave unsaid that ranks are started, and what that means for the script.

    Raises:
        ValueError: the strategy runs on one rank, the ranks that run are not as many as asked for, or the environment
            contradicts itself.
    """
    asked = range_of(devices)
    place = find_place()
    if not place.is_alone:
        if place.started_by == TORCHRUN:
            if LAUNCHER in os.environ:
                end_with(int(os.environ[LAUNCHER]))
            elif (agent := elastic_agent()) is not None:
                end_with(agent)
        if max_restarts and LAUNCHER not in os.environ and place.rank == 0:
            warnings.warn(
                f"max_restarts={max_restarts} has no effect under {place.started_by}, which starts the ranks. Tell it "
                "there: torchrun --max-restarts, or requeue=True under SLURM.",
                stacklevel=3,
            )
        if asked is not None:
            place.check_devices(*asked)
        if place.world_size > 1 and not strategy.needs_ranks:
            raise ValueError(
                f"strategy={strategy.name!r} runs in one process, but {place.world_size} ranks were started, which "
                "would all do the same work. Use strategy='ddp' or 'fsdp2', or start one process."
            )
        return
    if asked is None:
        asked = (max(1, torch.accelerator.device_count()) if strategy.needs_ranks else 1,) * 2
    fewest, most = asked
    if strategy.needs_ranks:
        warn_of_missing_srun(most)
    if most == 1:
        return
    if not strategy.needs_ranks:
        raise ValueError(
            f"strategy={strategy.name!r} runs in one process, so devices={devices!r} would have no effect. "
            "Use strategy='ddp' or 'fsdp2'."
        )
    check_range(fewest, most, max_restarts)
    launch(fewest, most, max_restarts, signals, "" if is_quiet else explanation(most))


def range_of(devices: int | str) -> tuple[int, int] | None:
    """Read ``devices``: the fewest ranks and the most; None for "auto".

    Raises:
        ValueError: it is something else.

    Example:
        >>> range_of(4), range_of("2:4"), range_of("auto")
        ((4, 4), (2, 4), None)
    """
    if devices == "auto":
        return None
    written = re.fullmatch(r"(\d+):(\d+)", devices) if isinstance(devices, str) else None
    if written is not None:
        fewest, most = int(written[1]), int(written[2])
    elif isinstance(devices, int) and not isinstance(devices, bool):
        fewest = most = devices
    else:
        fewest = most = 0
    if not 1 <= fewest <= most:
        raise ValueError(
            "devices takes a number of ranks, a range ('1:2': the fewest and the most), or 'auto'. Received: "
            f"{devices!r}"
        )
    return fewest, most


@dataclass(frozen=True)
class Launched:
    """How a launcher that may start ranks again has started this one.

    Attributes:
        run: the launcher's name for all of its attempts; that of rank 0 counts.
        attempt: how often ranks that failed were started again, as far as the launcher of this machine knows.
        may_come_again: whether ranks that fail now are started again.
        most: ranks, where none is lost; 0 where that isn't known.
        has_range: whether it was asked to go on with fewer.
    """

    run: str
    attempt: int = 0
    may_come_again: bool = False
    most: int = 0
    has_range: bool = False


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """Read how this rank was started; None where nobody would start it again."""
    run = environment.get("TORCHELASTIC_RUN_ID", environment.get(RUN))
    if run is None or "RANK" not in environment:
        return None
    if run == UNNAMED:
        run = f"{run}, {socket.gethostname()}, {describe_process(os.getppid())}"
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    most = int(environment.get(ELASTIC, "0:0").partition(":")[2])
    again = attempt < int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) or RUN in environment
    return Launched(run, attempt, again, most or int(environment["WORLD_SIZE"]) * (LAUNCHER in environment), most > 0)


def explanation(ranks: int) -> str:
    """Say what becomes of a script that is run again for each rank."""
    script = Path(sys.argv[0]).name
    by_file = script.endswith(".py") and sys.argv[0] in sys.orig_argv  # a module has its file's path in argv alone
    instead = f" `stratagem launch --devices {ranks} {script}` runs it on the ranks alone." if by_file else ""
    return f"Starting {ranks} ranks: what stands before Fit has run here, and runs once more on each of them.{instead}"


def launch(fewest: int, most: int, max_restarts: int, signals: Iterable[str] = (), explained: str = "") -> NoReturn:
    """Run this process's command line on several ranks of this machine, and exit with their status.

    Args:
        fewest, most: ranks; see ``Launch``.
        max_restarts: how often all ranks are started again after one failed.
        signals: names of those that are passed on to the ranks, beside SIGTERM and SIGINT.
        explained: what is said before the ranks are started.
    """
    if not sys.argv[0] or hasattr(sys, "ps1"):
        raise ValueError(
            f"devices={most} runs the calling script once for each rank, but there is no script: this is an "
            "interactive session. Put what makes the Fit and trains it into a function and write "
            f"stratagem.launch(function, devices={most}), or write a file and run it."
        )
    if explained:
        say(explained)
    sys.exit(run_on_ranks([sys.executable, *sys.orig_argv[1:]], fewest, most, max_restarts, signals))


def run_on_ranks(
    command: Sequence[str],
    fewest: int | None,
    most: int | None,
    max_restarts: int = 0,
    signals: Iterable[str] = (),
    sent: bytes | None = None,
    inherited: tuple[int, ...] = (),
) -> int:
    """Run a command on several ranks of this machine, and return their status.

    Args:
        command: of each rank.
        fewest, most: ranks; None for one for each accelerator.
        max_restarts: how often all ranks are started again after one failed.
        signals: names of those that are passed on to the ranks, beside SIGTERM and SIGINT.
        sent, inherited: see ``Launch``.

    Raises:
        ValueError: this process is a rank already, fewer ranks would never come about, or the system has no POSIX
            signals.
    """
    if not hasattr(os, "killpg"):
        raise ValueError(
            f"devices={most} starts ranks that are ended by POSIX signals, and this is Windows. Write devices=1, or "
            "run it in the Windows Subsystem for Linux."
        )
    if not (place := find_place()).is_alone:
        raise ValueError(f"This process is rank {place.rank} of {place.world_size} already, by {place.started_by}.")
    most = most or max(1, torch.accelerator.device_count())
    fewest = fewest or most
    check_range(fewest, most, max_restarts)
    # Ranks that each use all cores slow one another down; torchrun does the same, with 1.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // most)))
    numbers = {signal.Signals[name] for name in ("SIGTERM", "SIGINT", *signals)}
    return supervise(Launch(command, fewest, most, max_restarts, sorted(numbers), sent, inherited))


def check_range(fewest: int, most: int, max_restarts: int) -> None:
    """Refuse a range of ranks where nothing is started again.

    Raises:
        ValueError: says what to write.
    """
    if fewest < most and max_restarts == 0:
        raise ValueError(
            f"devices='{fewest}:{most}' goes on with fewer ranks when it is started again, and max_restarts=0 never "
            f"does that. Write max_restarts=, or devices={most}."
        )


def local_ranks() -> int:
    """Return the number of ranks of this run on this machine."""
    return find_place().local_world_size


def describe_process(process: int) -> str:
    """Name a process of this machine as no other is named before the machine starts anew, where the system tells."""
    try:
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = "0"
    return f"process {process} of {began}"


def elastic_agent() -> int | None:
    """The process of torchrun that started this rank, where it did, and is this one's parent.

    A rank's environment says that an agent of torch's elastic launcher started it, but is inherited by every process
    that the rank starts: the agent is a parent that doesn't have it itself. None where the parent can't be looked at
    (on another system than Linux), is a script that torchrun runs in the rank's place, or was there from the start of
    the machine or the container: process 1 is also the parent of those whose own is gone.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    parent = os.getppid()
    if run is None or parent == 1:
        return None
    try:
        inherited = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return None if f"TORCHELASTIC_RUN_ID={run}".encode() in inherited else parent


def end_with(launcher: int) -> None:
    """Have the kernel end this rank when its launcher is gone, which could no longer do it: a killed launcher would
    leave ranks that hold their devices and wait for one another. On Linux; elsewhere such ranks stay.

    Args:
        launcher: its process, the parent of this one.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # the launcher had ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)
