"""Work in copies of this process: what they set, import and place ends with them; answers come back by pipes."""

import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], Mapping[str, Any]]
OF_LAUNCHERS = "STRATAGEM_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_"  # what the names of their variables begin with
LINES = 30  # of what a copy printed that are kept


@dataclass(frozen=True)
class Ended:
    """How a copy ended.

    Attributes:
        answer: what its work returned; None where it raised, or the copy was killed.
        status: of the process.
        printed: the end of what it printed, where there is no answer.
    """

    answer: Mapping[str, Any] | None
    status: int
    printed: str = ""


def run_forked(works: Sequence[Work], environment: Mapping[str, str]) -> list[Ended]:
    """Do each work in a copy of this process, as many at once as there are cores.

    The copies see no GPU, compute in one thread, and print nothing. They have this process's files: what reads on from
    where an open file stands moves it for this process, too.

    Args:
        works: each returns a mapping of JSON's types.
        environment: variables of the copies, beside this process's.

    Returns:
        How each ended, in their order.

    Raises:
        ValueError: this system can't copy a process.
    """
    if not hasattr(os, "fork"):
        raise ValueError(
            "Strategies are chosen in copies of the process, which this system can't make. Name a strategy."
        )
    waiting, running, found = list(works), list[Copy](), list[Ended]()
    try:
        while waiting or running:
            while waiting and len(running) < max(1, os.cpu_count() or 1):
                running.append(Copy(waiting.pop(0), environment))
            found.append(running[0].end())
            del running[0]
    finally:
        for copy in running:
            copy.kill()
    return found


class Copy:
    """A copy of this process that works.

    Args:
        work: to be done there.
        environment: of the copy.
    """

    def __init__(self, work: Work, environment: Mapping[str, str]) -> None:
        self.printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (until the end is read)
        reading, writing = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()  # else the copy would print it again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: a copy has one, and waits for no other
            self.process = os.fork()
        if not self.process:
            os.close(reading)
            self._work(work, environment, writing)
        os.close(writing)
        self.pipe = os.fdopen(reading)

    def _work(self, work: Work, environment: Mapping[str, str], writing: int) -> None:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for name in [name for name in os.environ if name.startswith(OF_LAUNCHERS)]:
                del os.environ[name]  # a rank ends with its launcher, whose child a copy isn't
            os.environ.update(environment)
            os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
            os.dup2(self.printed.fileno(), 1)
            os.dup2(self.printed.fileno(), 2)
            with redirect_stdout(self.printed), redirect_stderr(self.printed):
                status = answer(work, writing)
                self.printed.flush()
        finally:
            os._exit(status)  # nothing of this process's end happens twice

    def end(self) -> Ended:
        """Wait for the end."""
        with self.pipe:
            text = self.pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        with self.printed:
            self.printed.seek(0)
            lines = self.printed.read().splitlines()
        if status == 0:
            return Ended(json.loads(text), 0)
        return Ended(None, status, "\n".join(lines[-LINES:]))

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.process, signal.SIGKILL)
        self.end()


def answer(work: Work, writing: int) -> int:
    """Do the work of a copy, write its answer, and return the status with which the copy ends."""
    try:
        torch.set_num_threads(1)  # threads of a pool weren't copied, and would be waited for
        text = json.dumps(work())
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) and ended.code else 1
    except BaseException:
        traceback.print_exc()
        return 1
    with os.fdopen(writing, "w") as pipe:
        pipe.write(text)
    return 0
