"""Real ranks that stay: started once for each world size, they do one job after another over one process group.

A job is a function at the top of a test file. Every rank imports that file, calls the function with the same options
and sends back what it returns (numbers, strings, lists, mappings); tensors go through files.

Starting Python and torch takes seconds a rank, so ranks are forked from a server that has imported everything and done
nothing else. A job that fails or hangs on any rank ends all of them; the next job finds new ones.
"""

import atexit
import faulthandler
import gc
import inspect
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PRELOADED = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torchmetrics",
    "stratagem.strategies.ddp.strategy",
    "stratagem.strategies.fsdp1.strategy",
    "stratagem.strategies.tensor_parallel",
    "stratagem.framework.checkpoint",
    "pytest",
    "ranks",
)
SECONDS = 300.0  # for one job; other work may share the cores


class RankFailure(AssertionError):
    """A job raised, ended or hung; the message holds what the ranks said, the first to fail first."""


class Ranks:
    """``world_size`` processes in one process group.

    Args:
        world_size: how many.

    Example:
        >>> Ranks(2).run(train, strategy="ddp")[1]["losses"]
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def run(self, job: Callable[..., Any], seconds: float = SECONDS, **options: Any) -> list[Any]:
        """Call ``job(**options)`` on every rank.

        Returns:
            Each rank's result, in the order of ranks.

        Raises:
            RankFailure: a rank raised, or not all were done in time.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((Path(inspect.getfile(job)).stem, job.__name__, options, seconds))
        results, failures = [None] * self.world_size, []
        waiting, deadline = dict(zip(self.pipes, range(self.world_size), strict=True)), time.monotonic() + seconds
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} were not done after {seconds:.0f} s")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    done, results[rank] = pipe.recv()
                except EOFError:
                    done, results[rank] = False, "the process ended"
                if not done:
                    failures.append(f"rank {rank} failed in {job.__name__}:\n{results[rank]}")
                    # The others may wait for it for ever.
                    deadline = min(deadline, time.monotonic() + 5.0)
        if failures:
            said = [f"rank {rank} printed:\n{text[-6000:]}" for rank, text in enumerate(self.end()) if text.strip()]
            raise RankFailure("\n\n".join([*failures, *said]))
        return results

    def start(self) -> None:
        """Fork the ranks and have them join their process group."""
        atexit.register(self.end)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.directory = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.world_size):
            mine, theirs = context.Pipe()
            arguments = (rank, self.world_size, port, theirs, self._log(rank))
            process = context.Process(target=serve, args=arguments)  # no daemon: data workers are its children
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def _log(self, rank: int) -> Path:
        return Path(self.directory.name) / f"rank-{rank}.txt"

    def end(self) -> list[str]:
        """Kill the ranks.

        Returns:
            What each printed in its life.
        """
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        printed = [self._log(r).read_text() for r in range(len(self.processes)) if self._log(r).exists()]
        for pipe in self.pipes:
            pipe.close()
        if self.processes:
            self.directory.cleanup()
        self.processes, self.pipes = [], []
        return printed


def become_rank(rank: int, world_size: int, port: int, log: Path) -> None:
    """Have this process know its place among the ranks, and print into a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)


def serve(rank: int, world_size: int, port: int, pipe: Any, log: Path) -> None:
    """What a rank does with its life."""
    become_rank(rank, world_size, port, log)
    import torch

    while True:
        try:
            module, name, options, seconds = pipe.recv()
        except EOFError:  # the tests are over
            os._exit(0)
        faulthandler.dump_traceback_later(max(1.0, seconds - 2.0), file=sys.__stderr__)  # says where a job hangs
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(import_module(module), name)(**options)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()
            gc.collect()
