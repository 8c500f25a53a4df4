"""Ranks that may die: forked for one run each from the server that has imported everything, without a launcher.

Rank 0 holds the store, as with srun or mpirun. What becomes of the ranks is told by their statuses, what they printed,
and how long each lived on after a moment.
"""

import importlib
import multiprocessing
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import PRELOADED, become_rank

STRUCK = "struck"  # the name of a file in the run's directory that a job makes right before its accident


@dataclass(frozen=True)
class End:
    """What became of a rank.

    Attributes:
        status: of its process; that of a signal is negative.
        seconds: it lived on after the accident; after the start, where there was none.
        printed: all that it wrote.
    """

    status: int
    seconds: float
    printed: str


def run_mortal(
    job: Callable[..., None], world_size: int, directory: Path, seconds: float = 60.0, **options: Any
) -> list[End]:
    """Call ``job(directory=..., **options)`` on new ranks, and see how each ends.

    Args:
        job: a function at the top of a test file.
        world_size: ranks.
        directory: for the run; made where it isn't there.
        seconds: from the accident, after which those that still live are killed (their status is None's, -9).
        **options: of the job.
    """
    directory.mkdir(parents=True, exist_ok=True)
    struck = directory / STRUCK
    struck.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [directory / f"printed-{rank}.txt" for rank in range(world_size)]
    module = Path(job.__code__.co_filename).stem
    processes = [
        context.Process(
            target=live, args=(rank, world_size, port, logs[rank], module, job.__name__, directory, options)
        )
        for rank in range(world_size)
    ]
    began = time.monotonic()
    for process in processes:
        process.start()
    ended: dict[int, float] = {}
    accident: float | None = None
    while len(ended) < world_size and time.monotonic() < (began + 90.0 if accident is None else accident + seconds):
        if accident is None and struck.exists():
            accident = time.monotonic()
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.monotonic()
        if ended and all(rank in ended or is_stopped(process.pid) for rank, process in enumerate(processes)):
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    since = began if accident is None else accident
    return [
        End(process.exitcode or 0, ended.get(rank, time.monotonic()) - since, logs[rank].read_text())
        for rank, process in enumerate(processes)
    ]


def is_stopped(process: int | None) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def live(
    rank: int, world_size: int, port: int, log: Path, module: str, job: str, directory: Path, options: dict[str, Any]
) -> None:
    """What a rank does with its life."""
    log.unlink(missing_ok=True)
    become_rank(rank, world_size, port, log)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.manual_seed(0)
    try:
        getattr(importlib.import_module(module), job)(directory=directory, **options)
    finally:
        sys.stdout.flush()
